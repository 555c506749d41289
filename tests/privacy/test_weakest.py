"""The main job with every defence at its weakest setting does what it does without one."""

import pytest

from tests.simulations.test_main_job import config, run
from vflair_flower.privacy.catalogue import defences
from vflair_flower.report import Result

WEAKEST = {
    "adversarial": "adversarial:weight=0",
    "custext": "custext:epsilon=1e9",
    "dp": "dp:epsilon=1e12,clip_rms=20,gradient_clip_norm=20",
    "dp-forward": "dp-forward:epsilon=1e12,clip_rms=20",
    "gradient-mirage": "gradient-mirage:kappa=inf,blinding=1",
    "information-bottleneck": "information-bottleneck:rank=32,weight=0,noise=false",
    "label-dp": "label-dp:epsilon=40",
    "mid": "mid:weight=0",
    "quantize": "quantize:bits=16",
    "rantext": "rantext:epsilon=1e6",
    "santext": "santext:epsilon=1e6,sensitive_share=1",
    "shuffle": "shuffle",
    "sparsify": "sparsify:keep=1",
    "split-and-denoise": "split-and-denoise:eta=1e8,texts=32,epochs=2,tokens=8,width=16",
    "textobfuscator": "textobfuscator:noise=0,close=0,away=0,clusters=6",
}
OWN_PARAMETERS = ("adversarial", "information-bottleneck", "mid", "textobfuscator")
"""These train parameters of their own at any setting, so that steps differ a little."""
STRONG = {"dp": "dp:epsilon=0.1", "dp-forward": "dp-forward:epsilon=0.1", "label-dp": "label-dp:epsilon=0.01"}


def finished(tmp_path, easy_rows, tiny_bert, text):
    changes = {"defences": text, "run_id": text.partition(":")[0] or "none", "rounds": 3, "passes": 6.0}
    run(config(tmp_path, easy_rows, tiny_bert, unsplit=False, audit="", **changes))
    return Result.read(tmp_path / "runs" / changes["run_id"] / "result.json")


def test_there_is_a_weakest_setting_of_every_defence():
    assert set(WEAKEST) == set(defences())


@pytest.mark.slow
def test_the_job_learns_what_it_learns_without_defence(tmp_path, easy_rows, tiny_bert):
    plain = finished(tmp_path, easy_rows, tiny_bert, "")
    assert plain.metric.split >= plain.metric.majority + 0.3
    for name, text in WEAKEST.items():
        weak = finished(tmp_path, easy_rows, tiny_bert, text)
        assert weak.metric.split == plain.metric.split, text
        losses, own = ([one.loss for one in result.rounds] for result in (plain, weak))
        if name in OWN_PARAMETERS:
            assert own[-1] == pytest.approx(losses[-1], abs=0.05), text
        else:
            assert own == pytest.approx(losses, abs=5e-3), text


@pytest.mark.slow
@pytest.mark.parametrize("name", STRONG)
def test_a_strong_setting_does_not(tmp_path, easy_rows, tiny_bert, name):
    strong = finished(tmp_path, easy_rows, tiny_bert, STRONG[name])
    assert strong.metric.split <= strong.metric.majority + 0.2
