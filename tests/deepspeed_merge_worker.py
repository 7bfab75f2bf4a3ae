"""DeepSpeed's own merging of tensor shards (ds_to_universal, `merge_tp_slices`), for given shards.

Reads `CASES.npz` (`CASE RANK`: shards) and `cases.json` (each with `info`), writes `merged.npz`.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import numpy as np
import torch
from deepspeed.checkpoint.ds_to_universal import merge_tp_slices


def main(folder: Path) -> None:
    """All cases of a folder."""
    cases = json.loads((folder / "cases.json").read_text())
    merged = {}
    with np.load(folder / "shards.npz") as shards:
        for number, case in enumerate(cases):
            slices = [shards[f"{number} {rank}"] for rank in range(case["ranks"])]
            own = folder / str(number)
            for rank, shard in enumerate(slices):
                at = own / "slices" / "w" / str(rank)
                at.mkdir(parents=True)
                for state in ("fp32", "exp_avg", "exp_avg_sq"):
                    torch.save(torch.from_numpy(shard).flatten(), at / f"{state}.00")
            shapes = [torch.Size(shard.shape) for shard in slices]
            where = str(own / "out"), str(own / "slices")
            for part in case["info"].get("parameter_with_sub_params", ()):
                part["shape"] = [tuple(n) if isinstance(n, list) else n for n in part["shape"]]
            merge_tp_slices(case["info"], *where, case["ranks"], ("w", shapes))
            found = torch.load(own / "out" / "w" / "fp32.pt", weights_only=False)
            merged[str(number)] = found["param"].numpy()
    np.savez(folder / "merged.npz", **merged)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
