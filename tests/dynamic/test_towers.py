"""A whole CLIP: each tower mixes by its own input, alone as together, and never by the other's."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as hf
from making import K, Made, seeded, write
from torch import Tensor

from mowmerge.dynamic.format import Gate, Router

torch.set_num_threads(1)
SIZES = {
    "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4,
}  # fmt: skip
IDS = torch.tensor([0, 2, 1, 2])


def clip() -> Any:
    ends = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
    text = {**SIZES, **ends, "vocab_size": 50, "max_position_embeddings": 16}
    vision = {**SIZES, "image_size": 16, "patch_size": 8}  # five tokens
    return seeded(
        hf.CLIPModel,
        hf.CLIPConfig(text_config=text, vision_config=vision, projection_dim=24),
    )


def given(tokens: int = 7) -> dict[str, Tensor]:
    """Texts, the first one padded, and pictures."""
    draw = torch.Generator().manual_seed(1)
    pictures = torch.randn(4, 3, 16, 16, generator=draw)
    ids = torch.randint(3, 50, (4, tokens), generator=draw)
    ids[:, -1] = 2
    mask = torch.ones_like(ids)
    mask[0, 3:] = 0
    return {"input_ids": ids, "attention_mask": mask, "pixel_values": pictures}


def blocks(folder: Path, plain: Any) -> Made:
    """Each MLP mixed by a router on what enters it."""
    names = [f"{tower}{i}" for tower in ("t", "v") for i in range(2)]
    gates = {name: Gate("block", "r", 0.3) for name in names}
    router = Router("mlp", 32, K, activation="none", init=0.3)

    def block(name: str) -> str:
        tower = "v" if "vision" in name else "t"
        return tower + next(part for part in name.split(".") if part.isdigit())

    return write(
        folder, plain, codec="full", gates=gates, routers={"r": router}, gate_of=block,
        pick=lambda name: ".mlp." in name,
    )  # fmt: skip


@pytest.fixture
def routed(tmp_path: Path) -> Any:
    dynamic = blocks(tmp_path, clip()).load()
    with torch.no_grad():
        for value in dynamic.mow_router.parameters():
            value.normal_(0, 0.5)
        yield dynamic


def unit(found: Any) -> Tensor:
    value = found if isinstance(found, Tensor) else found.pooler_output
    return torch.nn.functional.normalize(value, dim=-1)


def test_a_tower_alone_answers_as_it_does_beside_the_other(routed: Any) -> None:
    batch = given()
    whole = routed(**batch)
    texts = {k: batch[k] for k in ("input_ids", "attention_mask")}
    assert torch.allclose(unit(routed.get_text_features(**texts)), whole.text_embeds, atol=1e-6)
    pictures = unit(routed.get_image_features(pixel_values=batch["pixel_values"]))
    assert torch.allclose(pictures, whole.image_embeds, atol=1e-6)
    one = unit(routed.get_image_features(pixel_values=batch["pixel_values"][2:3]))
    assert torch.allclose(one, whole.image_embeds[2:3], atol=1e-5)
    assert not routed._context.active


def test_padding_of_texts_hides_no_part_of_a_picture(routed: Any) -> None:
    five, seven = (routed(**given(tokens)).image_embeds for tokens in (5, 7))  # five patches, too
    assert torch.allclose(five, seven, atol=1e-6)


def test_texts_and_pictures_that_are_no_pairs_are_refused(routed: Any) -> None:
    batch = given()
    two = {k: v[:2] if k != "pixel_values" else v for k, v in batch.items()}
    with pytest.raises(ValueError, match=r"2 texts and 4 pictures: .* get_image_features"):
        routed(**two)


@pytest.mark.parametrize(("scope", "says"), [
    ("sample", "without the classifier: pass task_ids"), ("task", "pass task_ids"),
])  # fmt: skip
def test_a_tower_alone_is_told_its_experts_or_says_so(
    scope: str, says: str, tmp_path: Path
) -> None:
    router = {"0": Router("linear", 32, K, layer=1)} if scope == "sample" else {}
    made = write(
        tmp_path, clip(), codec="full_abs", gates={"0": Gate(scope, "0" if router else "")},
        routers=router, pick=lambda name: "encoder" in name,
    )  # fmt: skip
    dynamic, batch = made.load(), given()
    with torch.no_grad():
        whole = dynamic(**batch, task_ids=IDS)
        if scope == "sample":
            assert torch.isfinite(dynamic(**batch).image_embeds).all()  # the classifier's choice
        found = unit(dynamic.get_image_features(pixel_values=batch["pixel_values"], task_ids=IDS))
        assert torch.allclose(found, whole.image_embeds, atol=1e-6)
        with pytest.raises(ValueError, match=says):
            dynamic.get_image_features(pixel_values=batch["pixel_values"])


def llava() -> Any:
    ends = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
    vision = hf.CLIPVisionConfig(**SIZES, image_size=16, patch_size=8)  # four patches
    text = hf.LlamaConfig(**SIZES, **ends, num_key_value_heads=2, vocab_size=50)
    config = hf.LlavaConfig(
        vision_config=vision, text_config=text, image_token_id=49, vision_feature_layer=-1
    )
    return seeded(hf.LlavaForConditionalGeneration, config)


def test_pictures_among_words_belong_to_their_sample(tmp_path: Path) -> None:
    dynamic = blocks(tmp_path, llava()).load()
    pictures = torch.randn(4, 3, 16, 16, generator=torch.Generator().manual_seed(1))
    ids = torch.tensor([[3, *[49] * 8, 5, 6], [4, *[49] * 8, 7, 8]])  # two each
    with torch.no_grad():
        for value in dynamic.mow_router.parameters():
            value.normal_(0, 0.3)
        whole = dynamic(input_ids=ids, pixel_values=pictures).logits
        for b in range(2):
            own = {"input_ids": ids[b : b + 1], "pixel_values": pictures[2 * b : 2 * b + 2]}
            assert torch.allclose(dynamic(**own).logits[0], whole[b], atol=1e-5)
        uneven = torch.tensor([[*[0] * 8, *[49] * 4, 5], [*[49] * 12, 5]])
        with pytest.raises(ValueError, match="pictures of different numbers or sizes"):
            dynamic(input_ids=uneven, attention_mask=(uneven != 0).long(), pixel_values=pictures)
