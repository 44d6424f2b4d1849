"""Configs survive JSON, refuse what they do not know, and read the command line as their fields' types."""

import dataclasses
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, Literal

import pytest
from hypothesis import given
from hypothesis import strategies as st

from minwm.core.config import ConfigError, UserError, dumps, from_dict, loads, lookup, override, to_dict


@dataclass(frozen=True)
class Ring:
    kind: ClassVar[str] = "ring"
    radius: float = 1.0
    hue: int = 0


@dataclass(frozen=True)
class Box:
    kind: ClassVar[str] = "box"
    sides: tuple[int, int] = (1, 2)
    hue: int = 5

    def __post_init__(self) -> None:
        if self.sides[0] > self.sides[1]:
            raise ConfigError(f"box.sides = {self.sides}: the shorter one comes first")


@dataclass(frozen=True)
class Optim:
    lr: float = 1e-4
    betas: tuple[float, ...] = (0.9, 0.95)
    low: int = 0
    high: int = 1

    def __post_init__(self) -> None:
        if self.low >= self.high:
            raise ConfigError(f"optim.low = {self.low} is not below optim.high = {self.high}")


@dataclass(frozen=True)
class Run:
    name: str
    optim: Optim = Optim()
    shape: Ring | Box = Ring()
    ema: Optim | None = None
    out: Path | None = None
    mode: Literal["fast", "slow", 3] = "fast"
    steps: int | float = 10
    amp: bool = False
    tags: tuple[str, ...] = ()
    weights: dict[str, float] = field(default_factory=dict)
    parts: tuple[Ring | Box, ...] = ()


FULL = Run(
    name="x",
    optim=Optim(1e-5, (0.5,), 1, 9),
    shape=Box((3, 4)),
    ema=Optim(),
    out=Path("runs/x"),
    mode=3,
    steps=2.5,
    amp=True,
    tags=("a", "b"),
    weights={"w": 1.0},
    parts=(Ring(2.0), Box()),
)


@pytest.mark.parametrize("run", [Run("x"), FULL])
def test_json_loses_nothing(run: Run) -> None:
    assert loads(Run, dumps(run)) == run
    assert type(loads(Run, dumps(run)).steps) is type(run.steps)


@given(st.floats(allow_nan=False, allow_infinity=False), st.integers(), st.text(), st.booleans())
def test_values_survive_exactly(lr: float, steps: int, name: str, amp: bool) -> None:
    run = Run(name, Optim(lr), steps=steps, amp=amp, tags=(name, name))
    assert loads(Run, dumps(run)) == run


def test_a_kind_is_written_and_chooses_the_class() -> None:
    assert to_dict(FULL)["shape"] == {"kind": "box", "sides": [3, 4], "hue": 5}
    assert from_dict(Run, {"name": "x", "shape": {"kind": "ring", "radius": 2}}).shape == Ring(2.0)
    assert from_dict(Ring | Box, {"kind": "box"}) == Box()


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"name": "x", "optim": {"lrr": 1}}, "Optim has no field 'lrr'; did you mean 'lr'?"),
        ({"name": "x", "zzzzz": 1}, "Run has no field 'zzzzz' (name, optim, shape,"),
        ({}, "Run needs a value for 'name'"),
        ({"name": 3}, "Run.name = 3: expected str, got int"),
        ({"name": "x", "optim": {"lr": "big"}}, "Optim.lr = 'big': expected float, got str"),
        ({"name": "x", "optim": {"high": 2.0}}, "Optim.high = 2.0: expected int, got float"),
        ({"name": "x", "optim": {"high": True}}, "Optim.high = True: expected int, got bool"),
        ({"name": "x", "optim": {"betas": [1, "b"]}}, "Optim.betas[1] = 'b': expected float"),
        ({"name": "x", "optim": 5}, "Run.optim = 5: expected the fields of Optim"),
        ({"name": "x", "amp": 1}, "Run.amp = 1: expected bool"),
        ({"name": "x", "mode": "fats"}, "Run.mode = 'fats': expected Literal['fast', 'slow', 3]"),
        (
            {"name": "x", "shape": {"kind": "rong"}},
            "there is no Run.shape of kind 'rong'; did you mean 'ring'?",
        ),
        ({"name": "x", "shape": {"radius": 1.0}}, "Run.shape needs a 'kind', one of 'ring', 'box'"),
        (
            {"name": "x", "shape": {"kind": "box", "sides": [1, 2, 3]}},
            "Box.sides = [1, 2, 3]: expected tuple",
        ),
        ({"name": "x", "shape": {"kind": "box", "sides": [2, 1]}}, "the shorter one comes first"),
        ({"name": "x", "ema": {"rl": 1.0}}, "Optim has no field 'rl'; did you mean 'lr'?"),
        ({"name": "x", "weights": {"w": "a"}}, "Run.weights['w'] = 'a': expected float"),
        ({"name": "x", "parts": [{"kind": "ring", "r": 1.0}]}, "Ring has no field 'r'"),
    ],
)
def test_mistakes_are_named(values: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError) as error:
        from_dict(Run, values)
    assert message in str(error.value)


def test_text_that_is_no_json_and_values_that_cannot_be_written() -> None:
    with pytest.raises(ConfigError, match=r"Run is not JSON: .*line 2"):
        loads(Run, '{"name": "x",\n oops}')
    with pytest.raises(ConfigError, match=r"Run.name = .*: a set cannot be written"):
        dumps(dataclasses.replace(FULL, name={1}))  # pyright: ignore[reportArgumentType]


@pytest.mark.parametrize(
    ("key", "text", "expected"),
    [
        ("optim.lr", "1e-3", 1e-3), ("optim.lr", "3", 3.0), ("optim.lr", ".5", 0.5),
        ("optim.lr", "inf", float("inf")),
        ("optim.betas", "0.5,1", (0.5, 1.0)), ("optim.betas", "0.5", (0.5,)), ("optim.betas", "[]", ()),
        ("name", "3", "3"), ("name", "none", "none"), ("name", "a,b", "a,b"), ("name", "", ""),
        ("amp", "true", True), ("amp", "False", False),
        ("out", "runs/y", Path("runs/y")), ("out", "none", None),
        ("mode", "slow", "slow"), ("mode", "3", 3),
        ("steps", "7", 7), ("steps", "7.0", 7.0),
        ("tags", "a,b", ("a", "b")), ("tags", "", ()), ("weights", '{"w": 2}', {"w": 2.0}),
        ("shape", "box", Box()), ("shape.kind", "box", Box()),
        ("shape", '{"kind": "ring", "radius": 4}', Ring(4.0)),
        ("shape.radius", "4", Ring(4.0)), ("ema", "none", None), ("ema", "{}", Optim()),
        ("ema.lr", "0.5", Optim(0.5)),
        ("optim", Optim(2.0), Optim(2.0)),
    ],
)  # fmt: skip
def test_overrides_are_read_as_the_fields_type(key: str, text: Any, expected: Any) -> None:
    value: Any = override(Run("x"), {key: text})
    for name in key.removesuffix(".kind").split(".") if key not in ("shape.radius", "ema.lr") else [key.split(".")[0]]:
        value = getattr(value, name)
    assert value == expected and type(value) is type(expected)


def test_overrides_apply_together() -> None:
    run = override(Run("x"), {"optim.low": "5", "optim.high": "6", "shape.kind": "box", "shape.sides": "7,8"})
    assert (run.optim.low, run.optim.high, run.shape) == (5, 6, Box((7, 8)))
    assert override(run, {"shape.kind": "box", "shape.sides": "8,9"}).shape == Box((8, 9))


@pytest.mark.parametrize(
    ("key", "text", "message"),
    [
        ("optim.lrr", "1", "Optim has no field 'lrr'; did you mean 'lr'?"),
        ("optim.lr", "big", "Optim.lr = 'big': expected float, got str"),
        ("optim.low", "5", "optim.low = 5 is not below"),
        ("amp", "maybe", "Run.amp = 'maybe': expected bool"),
        ("name.length", "5", "Run.name = 'x' has no field 'length'"),
        ("shape.kind", "bax", "there is no Run.shape of kind 'bax'; did you mean 'box'?"),
        ("shape", '{"kind": "ring", "radios": 4}', "Ring has no field 'radios'; did you mean 'radius'?"),
        ("shape.sides", "1,2", "Ring has no field 'sides'"),
    ],
)
def test_mistaken_overrides_are_named(key: str, text: str, message: str) -> None:
    with pytest.raises(ConfigError) as error:
        override(Run("x"), {key: text})
    assert message in str(error.value)


def test_another_kind_resets_nothing_in_silence() -> None:
    run = Run("x", shape=Ring(radius=2.0, hue=3))
    with pytest.raises(ConfigError, match=r"Run.shape of kind 'box' would reset hue=3; give these fields, too"):
        override(run, {"shape.kind": "box"})
    with pytest.raises(ConfigError, match="would reset hue=3"):
        override(run, {"shape": "box"})
    assert override(run, {"shape": "box", "shape.hue": "3"}).shape == Box(hue=3)
    assert override(run, {"shape": '{"kind": "box"}'}).shape == Box(), "a whole value replaces all"
    assert override(Run("x", shape=Ring(hue=5)), {"shape": "box"}).shape == Box(), "the same value is no loss"
    assert override(run, {"shape.kind": "ring"}).shape == run.shape


def test_lookup_suggests() -> None:
    assert lookup({"demo": 1}, "demo", "preset") == 1
    with pytest.raises(UserError, match=r"there is no preset 'dmeo'; did you mean 'demo'\?"):
        lookup({"demo": 1, "wan": 2}, "dmeo", "preset")
    with pytest.raises(UserError, match=r"there is no preset 'zzz' \(demo, wan\)"):
        lookup({"demo": 1, "wan": 2}, "zzz", "preset")
