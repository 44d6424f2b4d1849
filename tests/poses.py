"""How far two camera tracks are apart."""

import numpy as np

from minwm.cameras.track import CameraTrack, so3_log


def pose_errors(a: CameraTrack, b: CameraTrack) -> dict[str, np.ndarray]:
    """Rotation `rot_deg` and translation `trans` between the poses of each frame; nothing is aligned first."""
    rotation = so3_log(a.c2w[:, :3, :3].swapaxes(1, 2) @ b.c2w[:, :3, :3])
    return {
        "rot_deg": np.degrees(np.linalg.norm(rotation, axis=-1)),
        "trans": np.linalg.norm(a.c2w[:, :3, 3] - b.c2w[:, :3, 3], axis=-1),
    }
