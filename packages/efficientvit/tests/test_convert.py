"""Official checkpoints to ours and back."""

import json
from pathlib import Path

import pytest
import torch

from vitreous_core.errors import StateMismatch
from vitreous_core.state import check_state
from vitreous_core.testing.golden import golden_manifest_state, golden_path, state_sha256
from vitreous_efficientvit import EfficientViTMSRA
from vitreous_efficientvit.convert import from_official, to_official

TESTS = Path(__file__).parent

# `golden_state_sha256` of the manifests: names, shapes and golden values of all floating entries, in order.
DIGESTS = {
    "m0": "c29e786a6496851c0554b03db5c29da0ef049024b118d2af52057204c30921f2",
    "m0_dist": "f506f6b3776b91a54ad36eafa89e082e4ddf7c88d5ad709584238a18657fe5c6",
    "m1": "58faca981bfe789697853127b1699d1c80bc1a2012413b50bd49a8f71a0deb71",
    "m2": "013f9116f35a1861269909790034f4892cf860add17403ee2fe23b55901dcf94",
    "m3": "6182b0636a9c40dd52df5c03b21b336c859c7732887398f151c5be6b7d959512",
    "m4": "4785e935baed831102bbdca50d21e1a4f5cbadf3aa3cd5bbee76a5c0932f69b6",
    "m5": "6ba2d2d3447d6452ceeb47cf90ad925fd31172b50eb4365aee042996a5064e9b",
}


def manifest(name):
    return json.loads(golden_path(TESTS, f"efficientvit_{name}.keys.json").read_text())


@pytest.fixture(scope="module")
def official():
    return golden_manifest_state(manifest("m0")["entries"])


@pytest.mark.parametrize("name", DIGESTS)
def test_official_layout_of_every_variant(build, name):
    arch, _, distillation = name.partition("_")
    state = to_official(build(arch, bool(distillation)).state_dict())
    assert state_sha256(state) == DIGESTS[name]


@pytest.mark.parametrize("name", DIGESTS)
def test_manifest_of_every_variant(build, name):
    entries = manifest(name)["entries"]
    arch, _, distillation = name.partition("_")
    model = build(arch, bool(distillation), golden=False)
    state = to_official(model.state_dict())
    got = [(key, list(value.shape), str(value.dtype).removeprefix("torch.")) for key, value in state.items()]
    assert got == [(entry["name"], entry["shape"], entry["dtype"]) for entry in entries]
    parameters = {
        key for key, value in to_official(dict(model.named_parameters())).items() if value.is_floating_point()
    }
    assert parameters == {entry["name"] for entry in entries if entry["kind"] == "parameter"}


def test_exact_inverses(official):
    ours = from_official(official)
    assert all(key.startswith(("backbone.", "head.classifier.")) for key in ours)
    back = to_official(ours)
    assert list(back) == list(official)
    assert all(torch.equal(back[key], official[key]) for key in official)
    again = from_official(back)
    assert list(again) == list(ours)
    assert all(torch.equal(again[key], ours[key]) for key in ours)


def test_input_is_not_changed(official):
    before = dict(official)
    from_official(official)
    assert list(before) == list(official)


def test_matrices_of_old_files_become_convolutions(official):
    old = {
        key: value.flatten(1) if key.endswith((".c.weight", ".fc1.weight")) and value.shape[2:] == (1, 1) else value
        for key, value in official.items()
    }
    assert old["blocks1.0.ffn0.m.pw1.c.weight"].ndim == 2
    ours = from_official(old)
    expected = from_official(official)
    assert all(torch.equal(ours[key], expected[key]) for key in expected)
    assert ours["head.classifier.l.weight"].ndim == 2


class TestMismatch:
    """Everything that does not fit is an error that names it."""

    def check(self, build, state):
        check_state(build("m0", golden=False).state_dict(), from_official(state))

    def test_whole_state_fits(self, build, official):
        self.check(build, official)

    def test_missing(self, build, official):
        del official["blocks2.1.se.fc2.bias"]
        with pytest.raises(StateMismatch, match=r"missing: backbone\.blocks2\.1\.se\.fc2\.bias"):
            self.check(build, official)

    def test_surplus(self, build, official):
        official["blocks4.0.weight"] = torch.zeros(1)
        with pytest.raises(StateMismatch, match=r"surplus: backbone\.blocks4\.0\.weight"):
            self.check(build, official)

    def test_second_head_in_a_model_with_one(self, build, official):
        official["head_dist.l.bias"] = torch.zeros(1000)
        with pytest.raises(StateMismatch, match=r"surplus: head\.distillation_classifier\.l\.bias"):
            self.check(build, official)

    def test_kernels_of_the_downstream_m0(self, build):
        # Officially the detection M0 has kernels 7, 5, 3, 3: same keys, other shapes.
        arch = EfficientViTMSRA.arch_settings["m0"] | {"kernel_sizes": (7, 5, 3, 3)}
        with pytest.raises(StateMismatch, match=r"wrong shape: backbone.*dws\.0\.c\.weight \(needs .*5, 5.*7, 7"):
            self.check(build, to_official(build(arch, golden=False).state_dict()))

    def test_missing_index(self, official):
        del official["blocks3.4.mixer.m.attn.attention_bias_idxs"]
        with pytest.raises(StateMismatch, match=r"missing: blocks3\.4\.mixer\.m\.attn\.attention_bias_idxs"):
            from_official(official)

    def test_index_without_its_table(self, build, official):
        del official["blocks3.4.mixer.m.attn.attention_biases"]
        with pytest.raises(StateMismatch, match=r"missing: .*attention_biases; surplus: .*attention_bias_idxs"):
            self.check(build, official)

    def test_another_index(self, official):
        name = "blocks1.0.mixer.m.attn.attention_bias_idxs"
        official[name] = official[name].clone()
        official[name][0, 1] = 7
        with pytest.raises(StateMismatch, match="is not the row-major"):
            from_official(official)

    def test_foreign_key_of_ours(self):
        with pytest.raises(StateMismatch, match=r"keys must start with .*got 'neck\.weight'"):
            to_official({"neck.weight": torch.zeros(1)})

    @pytest.fixture
    def official(self, official):
        return dict(official)
