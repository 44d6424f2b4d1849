"""What a measured number should reach."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Target:
    """The bound of a number."""

    name: str
    bound: float
    at_least: bool = False
    """The bound is the least value; else the greatest."""

    def met(self, value: float) -> bool:
        return value >= self.bound if self.at_least else value <= self.bound

    @property
    def aim(self) -> str:
        return f"at {'least' if self.at_least else 'most'} {self.bound:g}"
