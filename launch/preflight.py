"""Check all hosts before a run, with the run's own settings, under any launcher, in place of pretrain.py:

    deepspeed --hostfile hostfile launch/preflight.py CONFIG [a.b=c ...]
    torchrun --nproc-per-node 8 launch/preflight.py CONFIG [a.b=c ...]

World size against the layout, versions and settings, shared storage, clocks, all-to-all per parallel axis, the links
between hosts. The same as `ernie5 train --preflight`; train.preflight=true does it before the first step.
"""

import sys

from variables import adopt_launcher

from ernie5.__main__ import main

if __name__ == "__main__":
    sys.exit(main(["train", "--preflight", *adopt_launcher(sys.argv[1:])]))
