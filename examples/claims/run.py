"""Run all claims, the headline ones first; or list what is left.

python examples/claims/run.py [--only A3 C1] [--list] [--budget_seconds 3600] [--pair DIR] [--data_dir DIR]

Killed and started again, it resumes. `render.py` makes README.md from what is there.
"""

import a1_drift
import a2_offline_online
import a3_white_box
import a4_synthetic
import a5_scaling
import b1_who_writes
import b4_speed
import b5_transfer
import b6_lenience
import b7_chain
import b8_own_loss
import beyond
import beyond_vocabulary
import c1_tvd_plus_plus
import c2_stages
import c3_forgetting
from harness import main

CLAIMS = [
    module.CLAIM
    for module in (
        a3_white_box,
        c3_forgetting,
        a4_synthetic,
        c2_stages,
        c1_tvd_plus_plus,
        a5_scaling,
        a2_offline_online,
        b1_who_writes,
        beyond,
        beyond_vocabulary,
        b8_own_loss,
        b5_transfer,
        b7_chain,
        b4_speed,
        b6_lenience,
        a1_drift,
    )
]

if __name__ == "__main__":
    main(CLAIMS)
