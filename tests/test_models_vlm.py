"""Pretrained backbones in a policy: the hidden states of transformers' own model, and only what may train does."""

# ruff: noqa: E402 - what needs torch is imported once torch is known to be there
from pathlib import Path

import numpy as np
import pytest
from dpipe.schemas.errors import DataError, UsageError

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")
pytest.importorskip("peft")

from dpipe.models.backbones import blueprint, hold_backbones, left_out
from dpipe.models.blocks import TEXT_LENGTH, ObservationEncoder
from dpipe.models.hf import qwen_patches
from dpipe.models.vlm import TEXT_TOKENS, Vlm, VlmEncoder, words_of
from tiny_backbones import BEGIN, END, IMAGE, save_internvl, save_qwen, save_siglip

SAVE = {"qwen": save_qwen, "internvl": save_internvl}


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> dict[str, str]:
    torch.set_num_threads(1)
    root = tmp_path_factory.mktemp("backbones")
    saved = {name: save(root / name) for name, save in {**SAVE, "siglip": save_siglip}.items()}
    return {name: f"hf:{folder}" for name, folder in saved.items()}


def frames(batch: int, size: int = 56, seed: int = 0) -> "torch.Tensor":
    return torch.from_numpy(np.random.default_rng(seed).integers(0, 256, (batch, size, size, 3), np.uint8))


# -- what it computes -------------------------------------------------------------------------------------


def test_hidden_states_are_those_of_transformers_own_qwen(folders):
    """Two images and words, as its own forward places and positions them."""
    vlm = Vlm(folders["qwen"]).eval()
    images = [frames(1), frames(1, seed=1)]
    text = vlm.tokens(["pick up the red cube"])
    count = int((text >= 0).sum())
    with torch.no_grad():
        hidden, present, _ = vlm(images, text)
    assert present.sum() == 2 * (4 + 2) + count

    pixels = [qwen_patches(vlm.frames.pixels(image), vlm.config.vision_config) for image in images]
    picture = [BEGIN, *[IMAGE] * 4, END]
    ids = torch.tensor([[*picture, *picture, *text[0, :count].tolist()]])
    with torch.no_grad():
        whole = vlm.model(
            input_ids=ids,
            mm_token_type_ids=(ids == IMAGE).int(),
            attention_mask=torch.ones_like(ids),
            pixel_values=torch.cat([patches for patches, _ in pixels]),
            image_grid_thw=torch.cat([grid for _, grid in pixels]),
        ).last_hidden_state
    torch.testing.assert_close(hidden[0, : ids.shape[1]], whole[0], atol=1e-5, rtol=1e-4)


def test_hidden_states_are_those_of_transformers_own_internvl(folders):
    vlm = Vlm(folders["internvl"]).eval()
    image, text = frames(1), vlm.tokens(["pick up the red cube"])
    count = int((text >= 0).sum())
    with torch.no_grad():
        hidden, present, _ = vlm([image], text)
        ids = torch.tensor([[1, *[IMAGE] * 4, 2, *text[0, :count].tolist()]])  # <img> .. </img>
        whole = vlm.model(
            input_ids=ids,
            attention_mask=torch.ones_like(ids),
            pixel_values=vlm.frames.pixels(image),
            vision_feature_layer=-1,
            vision_feature_select_strategy="default",
        ).last_hidden_state
    assert present.sum() == 6 + count
    torch.testing.assert_close(hidden[0, : ids.shape[1]], whole[0], atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("name", SAVE)
def test_added_vectors_follow_the_words_without_a_gap_and_no_sample_depends_on_another(folders, name):
    vlm = Vlm(folders[name]).eval()
    texts = ["pick up the red cube", "pick"]
    extra = torch.randn(2, 3, vlm.width)
    with torch.no_grad():
        together = vlm([frames(2)], vlm.tokens(texts), extra)[2]
        for i in range(2):
            alone = vlm([frames(2)[i : i + 1]], vlm.tokens(texts)[i : i + 1], extra[i : i + 1])[2]
            torch.testing.assert_close(alone, together[i : i + 1], atol=1e-5, rtol=1e-4)
        # A word's own embedding, added as a vector, is that word.
        word = vlm.model.language_model.embed_tokens(vlm.tokens(["cube"])[:, :1])
        read, present, _ = vlm([frames(1)], vlm.tokens(["red cube"]))
        added = vlm([frames(1)], vlm.tokens(["red"]), word)[2]
    last = int(present.sum()) - 1
    torch.testing.assert_close(added[0, 0], read[0, last], atol=1e-5, rtol=1e-4)


def test_an_encoder_gives_tokens_of_images_words_and_state_whatever_the_batch(folders):
    vlm = Vlm(folders["internvl"])
    encoder = VlmEncoder(vlm, ("a", "b"), (0.0,) * 3, (1.0,) * 3, 16).eval()
    words = words_of(encoder)(["pick up the red cube", "pick"])
    assert words.shape == (2, TEXT_LENGTH + TEXT_TOKENS)
    state = torch.randn(2, 3)
    with torch.no_grad():
        tokens = encoder([frames(2), frames(2, seed=1)], state, words)
        alone = encoder([frames(2)[1:], frames(2, seed=1)[1:]], state[1:], words[1:])
    assert tokens.shape == (2, 2 * 6 + TEXT_TOKENS + 1, 16)
    assert vlm.tokens_of_image(56, 56) == 6
    torch.testing.assert_close(alone, tokens[1:], atol=1e-5, rtol=1e-4)


def test_an_instruction_too_long_to_read_is_refused(folders):
    with pytest.raises(DataError, match="an instruction of 65 tokens; at most 64"):
        Vlm(folders["qwen"]).tokens([" ".join(["cube"] * 65)])


# -- what trains ------------------------------------------------------------------------------------------


def trainable(vlm: Vlm) -> set[str]:
    return {name for name, p in vlm.model.named_parameters() if p.requires_grad}


@pytest.mark.parametrize("name", SAVE)
def test_freeze_groups_cover_the_model_once_each(folders, name):
    every = {n for n, _ in Vlm(folders[name], freeze=()).model.named_parameters()}
    assert trainable(Vlm(folders[name], freeze=())) == every
    frozen = {
        group: every - trainable(Vlm(folders[name], (group,)))
        for group in ("vision", "merger", "embeddings", "llm")
    }
    assert all(frozen.values())
    assert sum(map(len, frozen.values())) == len(every) == len(set().union(*frozen.values()))
    assert trainable(Vlm(folders[name], ("vision", "merger", "embeddings", "llm"))) == set()


def test_layers_of_the_language_model_freeze_by_slice(folders):
    held = {n for n, p in Vlm(folders["qwen"], ("llm[1:]",)).named_parameters() if not p.requires_grad}
    assert held and all(".layers.1." in n for n in held)
    with pytest.raises(UsageError, match=r"unknown freeze group 'lm'.*Did you mean 'llm'"):
        Vlm(folders["qwen"], ("lm",))


@pytest.mark.parametrize("name", SAVE)
def test_adapters_train_in_place_of_the_language_model_and_start_at_nothing(folders, name):
    plain, adapted = Vlm(folders[name]).eval(), Vlm(folders[name], lora=4).eval()
    found = trainable(adapted)
    assert any("lora_A" in n for n in found)
    assert all("lora" in n for n in found if "language_model" in n)
    assert {n for n in found if "language_model" not in n} == {
        n for n in trainable(plain) if "language_model" not in n
    }
    text = plain.tokens(["pick up the red cube"])
    with torch.no_grad():
        torch.testing.assert_close(adapted([frames(1)], text)[0], plain([frames(1)], text)[0])


def test_what_is_frozen_stays_so_through_a_phase_and_out_of_checkpoints(folders):
    policy = torch.nn.ModuleDict({"vlm": Vlm(folders["qwen"], ("vision", "llm[:1]"))})
    policy.requires_grad_(True)
    hold_backbones(policy)
    frozen = {n for n, p in policy.named_parameters() if not p.requires_grad}
    assert frozen == left_out(policy)
    assert all(n.startswith(("vlm.model.visual.", "vlm.model.language_model.layers.0.")) for n in frozen)


def test_a_tower_is_shared_by_the_cameras_and_frozen_unless_asked_otherwise(folders):
    make = {"cameras": ("a", "b"), "mean": (0.0,) * 3, "std": (1.0,) * 3, "width": 16}
    encoder = ObservationEncoder(**make, vision=folders["siglip"])
    tokens = encoder([frames(2), frames(2, seed=1)], torch.zeros(2, 3), words_of(encoder)(["pick", "cube"]))
    assert tokens.shape == (2, 2 * 9 + 2, 16)
    tokens.sum().backward()
    assert all(p.grad is None for p in encoder.tower.parts.parameters())
    assert encoder.tower.enter.weight.grad.abs().sum() > 0
    assert left_out(encoder) == {f"tower.parts.{n}" for n, _ in encoder.tower.parts.named_parameters()}
    free = ObservationEncoder(**make, vision=folders["siglip"], freeze=False)
    free([frames(2), frames(2)], torch.zeros(2, 3), words_of(free)(["a", "b"])).sum().backward()
    assert sum(float(p.grad.abs().sum()) for p in free.tower.parts.parameters() if p.grad is not None) > 0
    assert left_out(free) == set()


# -- what is refused --------------------------------------------------------------------------------------


def test_other_architectures_specs_and_broken_folders_are_refused_by_name(folders, tmp_path):
    with pytest.raises(UsageError, match="expected hf:<folder"):
        Vlm("internvl")
    with pytest.raises(UsageError, match="unknown vision-language architecture 'siglip'"):
        Vlm(folders["siglip"])
    with pytest.raises(UsageError, match="unknown vision 'convolution'"):
        ObservationEncoder((), (), (), 16, vision="convolution")
    broken = tmp_path / "broken"
    broken.mkdir()
    for file in Path(folders["qwen"][3:]).iterdir():
        (broken / file.name).write_bytes(file.read_bytes())
    from safetensors.torch import load_file, save_file

    weights = load_file(broken / "model.safetensors")
    save_file(
        {n: w for n, w in weights.items() if "layers.1.mlp" not in n},
        broken / "model.safetensors",
        {"format": "pt"},
    )
    with pytest.raises(DataError, match="missing or of another shape: 3 tensors"):
        Vlm(f"hf:{broken}")


def test_a_blueprint_has_the_sizes_and_no_storage(folders):
    with blueprint():
        vlm = Vlm(folders["qwen"], lora=4)
    assert {p.device.type for p in vlm.parameters()} == {"meta"}
    real = Vlm(folders["qwen"], lora=4)
    assert {n: p.shape for n, p in vlm.named_parameters()} == {n: p.shape for n, p in real.named_parameters()}
    assert trainable(vlm) == trainable(real)
