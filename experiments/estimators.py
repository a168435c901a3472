"""sketch.py with another estimator of the gradient, for runs that compare them.

An estimator is an objective of the old responses; its gradient replaces g(s0). The means over tokens and
responses and the projection stay those of sketch.py, and so do the advantages A_k, except in recentred.

rho          the equation: grad rho A
clip         PPO's clipped objective: grad min(rho A, clip(rho, 0.8, 1.2) A); the default of the authors'
             gradient script, which their pipeline switches off
no-ratio     the weight of every token is 1: grad log pi A
recentred    the release's --cancel_ppo_clip --reweight_group_adv: the equation with A_k = (R_k - m) / (s +
             1e-4), where m and s, mean and standard deviation of a prompt's rewards, weigh response k by the
             geometric mean of its token ratios
fresh        the equation with responses that the current policy samples now, as many as --rollouts has

    ESTIMATOR=clip python experiments/estimators.py --model ... (everything else as in sketch.py)
"""

import os
import subprocess
import sys
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
import sketch

EQUATION = sketch.off_policy_surrogate


def mean_over_tokens(per_token, mask, k):
    """1/K sum_k 1/|tau_k| sum_t of per_token [B, T], as in sketch.off_policy_surrogate."""
    return ((per_token * mask).sum(1) / mask.sum(1)).sum() / k


def clipped(logp, logp_beta, advantages, mask, k, _):
    ratio, advantages = sketch.token_ratio(logp, logp_beta), advantages[:, None]
    return mean_over_tokens(torch.minimum(ratio * advantages, ratio.clamp(0.8, 1.2) * advantages), mask, k)


def without_ratio(logp, _, advantages, mask, k, __):
    return mean_over_tokens(logp * advantages[:, None], mask, k)


def recentred(logp, logp_beta, advantages, mask, k, _):
    """Since A is linear in R, weighted mean and standard deviation are taken of A. Needs all K responses."""
    logs = (logp.detach() - logp_beta) * mask
    weights = (logs.sum(1) / mask.sum(1)).exp().view(-1, k)
    weights, a = weights / weights.sum(1, keepdim=True), advantages.view(-1, k)
    a = a - (weights * a).sum(1, keepdim=True)
    a = a / ((weights * a**2).sum(1, keepdim=True).sqrt() + 1e-4)
    return EQUATION(logp, logp_beta, a.flatten(), mask, k)


SURROGATES = {"rho": EQUATION, "clip": clipped, "no-ratio": without_ratio, "recentred": recentred}


def sample(model, data, out, k, meta, seed):
    """collect.py: k responses of `model` to the prompts of a file; meta: the settings of earlier rollouts."""
    if not out.exists():
        subprocess.run([sys.executable, ROOT / "collect.py", "--model", model, "--data", data, "--out", out,
                        "--k", str(k), "--temperature", str(meta["temperature"]),
                        "--max-new-tokens", str(meta["max_new_tokens"]), "--verifier", meta["verifier"],
                        "--seed", str(seed)], check=True)


def main():
    estimator, arguments = os.environ["ESTIMATOR"], sys.argv
    if estimator == "fresh":
        values = {name: arguments.index(name) + 1 for name in ("--model", "--rollouts", "--out", "--seed")}
        model, first = arguments[values["--model"]], values["--rollouts"]
        phase = Path(arguments[values["--out"]]).parent  # phase-M
        seed = 1000 * (int(phase.name.split("-")[1]) + 1) + int(arguments[values["--seed"]])
        for place in range(first, values["--out"] - 1):
            meta = torch.load(arguments[place], weights_only=True, mmap=True)["meta"]
            out = phase / f"fresh-{Path(arguments[place]).name}"
            sample(model, meta["data"], out, meta["k"], meta, seed)
            arguments[place] = str(out)
    choose_sketcher = sketch.choose_sketcher

    def choose(policy, projection):
        sketcher = choose_sketcher(policy, projection)  # its trial is of the equation
        sketch.off_policy_surrogate = SURROGATES.get(estimator, EQUATION)
        return sketcher

    sketch.choose_sketcher = choose
    sketch.main()


if __name__ == "__main__":
    main()
