"""What kernels reach on the device at hand, measured: `shardwright calibrate`.

    cases        the grid: kinds, dtypes, shapes, their work
    operations   each case as something to call
    clock        seconds of a call, on the CPU or in a CUDA stream
    host         what the host spends on one call
    machine      the device's name and memory
    measure      climbs the grid within a time budget
    device_file  a Device from what was measured
    command      the body of the command

torch is imported only when something is measured.
"""

from .command import CALIBRATE_S, calibrated, run_calibrate

__all__ = ["CALIBRATE_S", "calibrated", "run_calibrate"]
