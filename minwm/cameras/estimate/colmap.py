"""Poses by COLMAP's incremental mapping (Schoenberger and Frahm 2016), through pycolmap, on the CPU."""

import tempfile
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any, ClassVar

from minwm.cameras.estimate.base import Estimate, EstimateError, Pictures, Seconds, chosen, filled, median_depth
from minwm.cameras.formats.base import Given
from minwm.cameras.formats.colmap import from_reconstruction, load_pycolmap, points_of, points_seen
from minwm.core.config import ConfigError
from minwm.core.media import write_image


@dataclass(frozen=True, kw_only=True)
class Colmap:
    """Features, matches and poses of a clip by COLMAP. A camera that only turns has no parallax, and gets no poses."""

    kind: ClassVar[str] = "colmap"
    focal: float | None = None
    """Focal length of the lens in widths of the picture; none solves for it, which needs parallax and long clips."""
    rows: int = 360
    """Pictures are reduced to so many pixels on their shorter side."""
    pictures: int = 40
    """Most pictures of a clip that are looked at, evenly spread; poses between them are interpolated."""
    registered: float = 0.9
    """Least share of these pictures that must get a pose."""
    residual: float = 2.0
    """Largest mean reprojection error in pixels."""
    angle: float = 2.0
    """Least angle in degrees between the rays of the two pictures that a model starts from."""
    threads: int = 1
    """Threads per clip; -1 for all."""

    def __post_init__(self) -> None:
        if self.focal is not None and not 0.2 < self.focal < 3:
            raise ConfigError(f"colmap.focal={self.focal}: widths of the picture, from 0.2 to 3, or none")
        if self.pictures < 3 or self.rows < 64 or not 0 < self.registered <= 1:
            raise ConfigError("colmap: pictures from 3, rows from 64, registered above 0 and up to 1")

    def __call__(self, pictures: Pictures, seconds: Seconds, fps: float) -> Estimate:
        """See `PoseEstimator`."""
        pycolmap = load_pycolmap()
        pycolmap.logging.minloglevel = pycolmap.logging.FATAL.value  # its progress on standard error
        used = chosen(len(pictures), self.pictures)
        with tempfile.TemporaryDirectory() as folder:
            for i in used:
                write_image(Path(folder) / f"{i:06d}.png", pictures[i])
            model = self._model(pycolmap, Path(folder), pictures.shape[1:3])
        names = [image.name for image in model.images.values() if image.has_pose] if model else []
        if len(names) < self.registered * len(used):
            raise EstimateError(
                f"COLMAP places {len(names)} of {len(used)} pictures: too little detail, or no parallax (a camera that "
                "only turns)"
            )
        if (error := float(model.compute_mean_reprojection_error())) > self.residual:
            raise EstimateError(f"points miss their places by {error:.2g} pixels (limit {self.residual:g})")
        cameras = from_reconstruction(model, Given(fps=fps))
        at = [int(Path(name).stem) for name in cameras.names]
        points = points_of(model)
        quality = {
            "registered": len(names) / len(used),
            "reprojection_px": error,
            "focal": float(cameras.track.K[0, 0]),
        }
        track = filled(cameras.track, at, seconds)
        return Estimate(track, median_depth(points, cameras.track), quality, points_seen(model, cameras.names[0]))

    def _model(self, pycolmap: ModuleType, folder: Path, size: tuple[int, int]) -> Any:
        """The largest pycolmap.Reconstruction of the pictures in a folder; None if there is none."""
        database, (height, width) = folder / "database.db", size
        extraction, matching = pycolmap.FeatureExtractionOptions(), pycolmap.FeatureMatchingOptions()
        extraction.use_gpu = matching.use_gpu = False
        extraction.num_threads = matching.num_threads = self.threads
        extraction.sift.peak_threshold = 0.003  # small pictures have few points
        reader = pycolmap.ImageReaderOptions(camera_model="SIMPLE_PINHOLE")
        if self.focal:
            reader.camera_params = f"{self.focal * width},{width / 2},{height / 2}"
        one_lens = pycolmap.CameraMode.SINGLE
        pycolmap.extract_features(
            database, folder, camera_mode=one_lens, reader_options=reader, extraction_options=extraction
        )
        pycolmap.match_sequential(database, matching_options=matching)
        options = pycolmap.IncrementalPipelineOptions(num_threads=self.threads, random_seed=0, extract_colors=False)
        options.ba_refine_focal_length = self.focal is None
        options.min_model_size = max(3, int(self.registered * len(list(folder.glob("*.png")))))
        options.max_num_models = 5  # another start where one leads to a small model
        options.mapper.init_min_tri_angle = self.angle
        options.mapper.init_min_num_inliers, options.mapper.abs_pose_min_num_inliers = 40, 12
        models = pycolmap.incremental_mapping(database, folder, folder / "models", options)
        return max(models.values(), key=lambda model: model.num_reg_images(), default=None)
