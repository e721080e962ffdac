"""What speculative decoding cannot do is refused by name, before anything is decoded."""

from typing import Any

import pytest
import torch
from peft import LoraConfig, PrefixTuningConfig, PromptTuningConfig, get_peft_model
from transformers import BartConfig, BartForConditionalGeneration, MambaConfig, MambaForCausalLM

from hf_draftkd import SpeculativeDecoding
from tests.tiny import tiny_llama, tiny_pair

PROMPT = torch.tensor([[0, 10, 11, 12]])
DRAFT, TARGET = tiny_pair()


def generate(**options: Any) -> Any:
    inputs = {"input_ids": PROMPT, "custom_generate": SpeculativeDecoding(DRAFT, 3), "max_new_tokens": 4}
    return TARGET.generate(**(inputs | options))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_beams": 2}, "beam"),
        ({"penalty_alpha": 0.6, "top_k": 4}, "contrastive"),
        ({"guidance_scale": 1.5}, "guidance_scale"),
        ({"return_dict_in_generate": True, "output_hidden_states": True}, "`output_hidden_states` is not collected"),
        ({"use_cache": False}, "use_cache"),
        ({"assistant_model": tiny_llama(5)}, "assistant_model"),
        ({"position_ids": torch.tensor([[3, 4, 5, 6]])}, "position_ids"),
        ({"input_ids": PROMPT.repeat(2, 1), "attention_mask": torch.tensor([[1, 1, 1, 0], [1, 1, 1, 1]])}, "left"),
        # The mask was ignored.
        ({"attention_mask": torch.ones(1, 3, dtype=torch.long)}, "3 columns and `input_ids` 4"),
        # A pad token inside a prompt: nothing said where the mask came from.
        ({"input_ids": torch.tensor([[3, 2, 4, 5]])}, "`generate` takes every pad token"),
        ({"assistant_ensemble_weight": 0.5, "custom_generate": SpeculativeDecoding(DRAFT, 3, lenience=0.5)}, "Both"),
        ({"custom_generate": SpeculativeDecoding(DRAFT, 3, lenience=0.5), "do_sample": False}, "do_sample"),
        ({"custom_generate": SpeculativeDecoding(tiny_llama(vocab_size=304), 3)}, "align_vocabulary"),
        ({"input_ids": None, "inputs_embeds": torch.zeros(1, 3, 16)}, "ids"),
        ({"synced_gpus": True}, "synced_gpus"),
    ],
)
def test_calls_that_cannot_be_honoured(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        generate(**options)


# peft 0.21 asks transformers 5.23 for an attribute under its old name.
@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")
@pytest.mark.parametrize("kind", [PromptTuningConfig, PrefixTuningConfig])
def test_a_target_with_a_learned_prompt(kind: type) -> None:
    """The text of the bare target, as if there were no adapter."""
    _, target = tiny_pair()
    tuned = get_peft_model(target, kind(task_type="CAUSAL_LM", num_virtual_tokens=3)).eval()
    options: dict[str, Any] = {"max_new_tokens": 4, "custom_generate": SpeculativeDecoding(DRAFT, 3)}
    with pytest.raises(ValueError, match="prepared by PeftModelForCausalLM"):
        tuned.generate(input_ids=PROMPT, attention_mask=torch.ones_like(PROMPT), **options)
    target.generate(PROMPT, **options)


def test_the_draft_itself_beside_it_is_no_contradiction() -> None:
    assert torch.equal(generate(assistant_model=DRAFT, do_sample=False), TARGET.generate(PROMPT, max_new_tokens=4))


@pytest.mark.parametrize("gamma", [0, -1, 2.5, True, "automatic"])
def test_draft_lengths(gamma: Any) -> None:
    with pytest.raises(ValueError, match="num_assistant_tokens"):
        SpeculativeDecoding(DRAFT, gamma)


@pytest.mark.parametrize("ids", [[], [-1], [300], ["a"]])
def test_draft_vocabularies(ids: Any) -> None:
    with pytest.raises(ValueError, match="draft_vocabulary"):
        SpeculativeDecoding(DRAFT, 3, draft_vocabulary=ids)


def test_a_draft_vocabulary_below_an_adapter_s_head() -> None:
    """A message that said the head is `Linear` and must be linear."""
    draft = get_peft_model(tiny_llama(2), LoraConfig(target_modules=["lm_head"], r=2))
    with pytest.raises(ValueError, match=r"peft\..*\.Linear"):
        SpeculativeDecoding(draft, 3, draft_vocabulary=[5, 6])


@pytest.mark.parametrize("options", [{"lenience": 0.0}, {"lenience": 1.5}, {"lenience_form": "cubic"}])
def test_lenience(options: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="lenience"):
        SpeculativeDecoding(DRAFT, 3, **options)


def test_a_name_in_place_of_a_draft() -> None:
    with pytest.raises(ValueError, match="load_draft"):
        SpeculativeDecoding("org/draft", 3)  # type: ignore[arg-type]


def test_recurrent_and_encoder_decoder_drafts() -> None:
    bart = BartConfig(vocab_size=300, d_model=16, encoder_layers=1, decoder_layers=1, encoder_attention_heads=2)
    mamba = MambaConfig(vocab_size=300, hidden_size=16, num_hidden_layers=1, state_size=4)
    for draft, message in (
        (BartForConditionalGeneration(bart), "encoder-decoder"),
        (MambaForCausalLM(mamba), "state"),
    ):
        with pytest.raises(ValueError, match=message):
            SpeculativeDecoding(draft, 3)
        with pytest.raises(ValueError, match=message):
            draft.generate(PROMPT, max_new_tokens=2, custom_generate=SpeculativeDecoding(DRAFT, 3))


def test_a_draft_on_another_device() -> None:
    with pytest.raises(ValueError, match=r"draft\.to"):
        generate(custom_generate=SpeculativeDecoding(tiny_llama(2).to("meta"), 3))


def test_tokenizers_that_lie_beside_the_models_are_compared(tmp_path: Any) -> None:
    from tests.tiny import TEXT, tiny_tokenizer

    draft, target = tiny_pair()
    for model, name, text in ((draft, "draft", [line[::-1] for line in TEXT]), (target, "target", TEXT)):
        tiny_tokenizer(text=text).save_pretrained(tmp_path / name)
        model.name_or_path = str(tmp_path / name)
    with pytest.raises(ValueError, match="tokenizers"):
        target.generate(PROMPT, custom_generate=SpeculativeDecoding(draft, 3), max_new_tokens=4)
