import pytest
import torch

from gpt_lightning.training import precision
from gpt_lightning.training.precision import NARROW, choose_precision, product_seconds


@pytest.fixture
def unmeasured(monkeypatch):
    def refuse(*_):
        raise AssertionError("measured")

    monkeypatch.setattr(precision, "product_seconds", refuse)


def measured(monkeypatch, fp32, bf16):
    """As on a processor whose product takes so many seconds; returns what was timed."""
    seconds, asked = {torch.float32: fp32, torch.bfloat16: bf16}, []

    def product(dtype, n_embd):
        asked.append((dtype, n_embd))
        return seconds[dtype]

    monkeypatch.setattr(precision, "product_seconds", product)
    return asked


@pytest.mark.parametrize("n_embd", [2, 32, NARROW - 1])
def test_a_narrow_model_is_fp32_without_measuring(unmeasured, n_embd):
    assert choose_precision("cpu", n_embd) == ("32-true", "a small model")


@pytest.mark.parametrize("n_embd", [NARROW, 384])
def test_a_wider_one_is_measured_at_its_own_width(monkeypatch, n_embd):
    asked = measured(monkeypatch, 1.0, 0.4)
    assert choose_precision("cpu", n_embd) == (
        "bf16-mixed",
        "matrix products in bf16 take 0.40 of fp32's time here",
    )
    assert sorted(asked, key=str) == [(torch.bfloat16, n_embd), (torch.float32, n_embd)]


@pytest.mark.parametrize(
    ("fp32", "bf16", "expected", "share"),
    [
        (10.0, 1.0, "bf16-mixed", "0.10"),
        (1.26, 1.0, "bf16-mixed", "0.79"),
        (1.25, 1.0, "32-true", "0.80"),  # no clear gain
        (1.0, 1.0, "32-true", "1.00"),
        (1.0, 4.0, "32-true", "4.00"),
    ],
)
def test_only_a_clear_gain_counts(monkeypatch, fp32, bf16, expected, share):
    measured(monkeypatch, fp32 / 1000, bf16 / 1000)
    chosen, reason = choose_precision("cpu", 256)
    assert chosen == expected and f"take {share} of" in reason


@pytest.mark.parametrize("n_embd", [16, 384])
@pytest.mark.parametrize(
    ("able", "expected"),
    [(True, ("bf16-mixed", "this GPU has it")), (False, ("32-true", "this GPU has no bf16"))],
)
def test_a_gpu_is_asked_whether_it_has_bf16_itself(monkeypatch, unmeasured, able, expected, n_embd):
    def supported(including_emulation=True):
        return able or including_emulation  # an older one can only imitate it, slowly

    monkeypatch.setattr(torch.cuda, "is_bf16_supported", supported)
    assert choose_precision("cuda", n_embd) == expected


@pytest.mark.parametrize("n_embd", [16, 384])
@pytest.mark.parametrize("device", ["mps", "xpu"])
def test_other_devices_are_fp32_without_measuring(unmeasured, device, n_embd):
    assert choose_precision(device, n_embd) == ("32-true", "safe everywhere")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_measurement_takes_a_moment(dtype):
    assert 0 < product_seconds(dtype, 128) < 5


def test_a_measurement_draws_no_random_numbers():
    before = torch.get_rng_state()
    assert choose_precision("cpu", 128)[0] in ("32-true", "bf16-mixed")
    assert torch.equal(torch.get_rng_state(), before)
