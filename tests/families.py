"""The model families, once: tests that hold for every family are parametrised over this list."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
import transformers

from tests.configs import (
    bert_config,
    gpt2_config,
    gptj_config,
    gptneo_config,
    gptneox_config,
    roberta_config,
)


@dataclass(frozen=True)
class FamilyCase:
    """One family.

    Attributes:
        name: for test ids; also the module in `tensorpar.translators`.
        title: for readers.
        model_type: Transformers' name.
        config: makes a tiny config from sizes that have the same names for all families; the
            defaults divide by no world size.
        model: the class of the model with a language modelling head.
        variants: arguments of Transformers' config under which the model has other parameters.
        heads: the other classes of models, the base model first.
        free: beginnings of the keys that smdistributed's table leaves alone.
    """

    name: str
    title: str
    model_type: str
    config: Callable[..., Any]
    model: str
    variants: tuple[Mapping[str, Any], ...] = ({},)
    heads: tuple[str, ...] = ()
    free: tuple[str, ...] = ()

    def state_dict(
        self, config: Any, dtype: torch.dtype = torch.float32, model: str | None = None
    ) -> dict[str, Any]:
        """A model's state dict with random values everywhere, tied where the model ties.

        `model` is the class; by default the one with a language modelling head.
        """
        built = getattr(transformers, model or self.model)(config)
        random = torch.Generator().manual_seed(0)
        values = {
            parameter.data_ptr(): torch.randn(parameter.shape, generator=random).to(dtype)
            for parameter in built.parameters()
        }
        return {name: values[tensor.data_ptr()] for name, tensor in built.state_dict().items()}


CROSS = {"is_decoder": True, "add_cross_attention": True}
FAMILIES = (
    FamilyCase(
        "gpt2",
        "GPT-2",
        "gpt2",
        gpt2_config,
        "GPT2LMHeadModel",
        ({}, {"add_cross_attention": True}),
        heads=(
            "GPT2Model",
            "GPT2DoubleHeadsModel",
            "GPT2ForSequenceClassification",
            "GPT2ForTokenClassification",
            "GPT2ForQuestionAnswering",
        ),
    ),
    FamilyCase(
        "bert",
        "BERT",
        "bert",
        bert_config,
        "BertForMaskedLM",
        ({}, CROSS),
        heads=(
            "BertModel",
            "BertForPreTraining",
            "BertLMHeadModel",
            "BertForNextSentencePrediction",
            "BertForSequenceClassification",
            "BertForTokenClassification",
            "BertForMultipleChoice",
            "BertForQuestionAnswering",
        ),
        free=("cls.",),
    ),
    FamilyCase(
        "roberta",
        "RoBERTa",
        "roberta",
        roberta_config,
        "RobertaForMaskedLM",
        ({}, CROSS),
        heads=(
            "RobertaModel",
            "RobertaForCausalLM",
            "RobertaForSequenceClassification",
            "RobertaForTokenClassification",
            "RobertaForMultipleChoice",
            "RobertaForQuestionAnswering",
        ),
        free=("lm_head.",),
    ),
    FamilyCase(
        "gptj",
        "GPT-J",
        "gptj",
        gptj_config,
        "GPTJForCausalLM",
        heads=("GPTJModel", "GPTJForSequenceClassification", "GPTJForQuestionAnswering"),
    ),
    FamilyCase(
        "gptneo",
        "GPT-Neo",
        "gpt_neo",
        gptneo_config,
        "GPTNeoForCausalLM",
        heads=(
            "GPTNeoModel",
            "GPTNeoForSequenceClassification",
            "GPTNeoForTokenClassification",
            "GPTNeoForQuestionAnswering",
        ),
    ),
)
#: families that smdistributed has no layout for.
PLANS_ONLY = (
    FamilyCase(
        "gptneox",
        "GPT-NeoX",
        "gpt_neox",
        gptneox_config,
        "GPTNeoXForCausalLM",
        heads=(
            "GPTNeoXModel",
            "GPTNeoXForSequenceClassification",
            "GPTNeoXForTokenClassification",
            "GPTNeoXForQuestionAnswering",
        ),
    ),
)
CASES = {case.name: case for case in FAMILIES}
