"""The one table of parity cells. ``make test`` runs the cells of the tier core, ``make test-all`` all of them;
``make parity`` runs every combination of the two matrices of `cells`.
"""

from __future__ import annotations

from dataclasses import replace

from hf_automodel_parallel.plan.sources.families import FAMILIES
from parity.cells import SEQUENCE_AXES, Cell

MODELS = (
    "llama",
    "llama_tied",
    "llama_odd_vocab",
    "qwen3",
    "gemma3",
    "phi3",
    "mixtral",
    "mixtral_aux",
    "qwen3_moe",
    "qwen3_moe_aux",
)


def _models() -> list[Cell]:
    """Every model in full and with LoRA on two axes; on the other meshes every model once, full and LoRA in turn."""
    kinds = ("full", "lora")
    cells = [Cell(model, adapter) for model in MODELS for adapter in kinds]
    for column, mesh in enumerate(("tp2", "fsdp2", "hsdp")):
        cells += [Cell(model, kinds[(row + column) % 2], mesh=mesh) for row, model in enumerate(MODELS)]
    cells += [Cell("llama", "lora", mesh="tp2_hsdp"), Cell("qwen3", mesh="tp2_hsdp"), Cell("llama", mesh="ddp_like")]
    cells += [Cell(model, "ends") for model in ("llama", "llama_odd_vocab")]
    cells += [Cell(model) for model in ("mistral", "olmo2", "cohere", "gemma3_softcap")]
    cells += [Cell("gpt2", mesh="fsdp2"), Cell("gpt2", "lora", mesh="hsdp")]
    return cells


#: What a loss over four slices of the vocabulary has to bear: soft-capped, scaled, tied, a router's loss beside it, an
#: adapter on the head.
VOCABULARY = [
    Cell("gemma3_softcap", "lora", mesh="tp4"),
    Cell("cohere", "lora", mesh="tp4"),
    Cell("llama_tied", mesh="tp4"),
    Cell("qwen3", "lora", mesh="tp4"),
    Cell("mixtral_aux", mesh="tp4"),
    Cell("llama", "ends", mesh="tp4"),
]

_BIASES = (("attention_bias", True), ("mlp_bias", True))

#: DoRA's norm runs over whole rows; row-wise layers hold slices of the columns, so it is summed over the ranks. The
#: bias of a row-wise layer is added on one rank only.
ADAPTERS = [
    *(Cell(model, "dora", mesh=mesh) for mesh in ("tp2_fsdp2", "tp2", "fsdp2") for model in ("llama", "qwen3", "phi3")),
    *(Cell("llama", adapter, overrides=_BIASES) for adapter in ("full", "lora", "dora", "bias_all")),
    *(Cell("llama", adapter) for adapter in ("rslora", "patterns", "one_layer", "saved_ends", "dora_biases")),
]

#: Every pair of values of two axes (a test checks that), and what pairs alone would leave out.
MATRIX = [
    Cell("qwen3_moe", "full", 0.0, "fsdp2", "submodule", False),
    Cell("llama", "dora", 0.1, "tp2", "submodule", True),
    Cell("qwen3_moe", "lora", 0.1, "tp2", "none", True),
    Cell("llama", "lora", 0.0, "hsdp", "selective", False),
    Cell("qwen3_moe", "dora", 0.1, "hsdp", "full", False),
    Cell("llama", "full", 0.0, "tp2", "full", True),
    Cell("llama", "dora", 0.0, "fsdp2", "none", False),
    Cell("qwen3_moe", "lora", 0.1, "fsdp2", "selective", True),
    Cell("qwen3_moe", "full", 0.0, "tp2_fsdp2", "selective", False),
    Cell("qwen3_moe", "dora", 0.0, "tp2", "selective", False),
    Cell("llama", "full", 0.0, "hsdp", "none", True),
    Cell("qwen3_moe", "lora", 0.0, "tp2_fsdp2", "full", False),
    Cell("qwen3_moe", "lora", 0.0, "hsdp", "submodule", False),
    Cell("llama", "dora", 0.0, "tp2_fsdp2", "none", False),
    Cell("qwen3_moe", "dora", 0.1, "tp2", "submodule", False),
    Cell("qwen3_moe", "dora", 0.1, "fsdp2", "full", False),
    # tensor parallel x HSDP
    Cell("llama", "lora", 0.1, "tp2_hsdp", "full", False),
    # the triple that has gone wrong most often in this stack: two-dimensional mesh, checkpoint, compiler
    Cell("llama", "lora", 0.1, "tp2_fsdp2", "full", True),
    Cell("llama", "lora", 0.1, "tp2_fsdp2", "selective", True),
    Cell("qwen3_moe", "lora", 0.0, "tp2", "selective", True),
    Cell("qwen3_moe", "lora", 0.0, "tp2", "full", True),
    # other families, for their own ways through a layer
    Cell("mixtral", "lora", 0.0, "tp2", "selective", False),
    Cell("llama_tied", "full", 0.0, "tp2_fsdp2", "submodule", False),
    Cell("gemma3", "lora", 0.0, "fsdp2", "selective", False),
    Cell("phi3", "full", 0.0, "tp2", "full", False),
    # layers that read the keys of earlier layers
    Cell("gemma3n", "full", 0.0, "fsdp2", "full", False),
    Cell("gemma3n", "lora", 0.0, "tp2", "submodule", False),
    Cell("qwen3", "full", 0.0, "tp2", "selective", True),
]

#: What the stock stack does wrong, where the matrix has other cells of it: compiled layers under tensor parallelism on
#: two axes and with the model's own checkpoints, dropout that a checkpoint draws anew.
STOCK = [
    Cell("llama", compiled=True),
    # the default of TRL with torch_compile
    Cell("llama", "lora", mesh="tp2", checkpointing="own", compiled=True),
    *(Cell("llama", "lora", 0.1, mesh, "full") for mesh in ("fsdp2", "tp2_fsdp2")),
]

#: model -> the modes of checkpointing whose cells are compiled: mostly on tp2, where there are two processes to
#: compile.
_COMPILED = {
    "llama": ("none",),
    "llama_tied": ("selective",),
    "qwen3": ("full",),
    "gemma3": ("selective",),
    "phi3": ("submodule",),
    "mistral": ("own",),
    "mixtral": ("selective",),
    "qwen3_moe": ("submodule",),
    "olmo2": ("full",),
    "cohere": ("none",),
}


def _sequence() -> list[Cell]:
    """Every model with every mode of checkpointing, which also has every pair of values of two axes."""
    adapters, meshes = SEQUENCE_AXES["adapter"], SEQUENCE_AXES["mesh"]
    cells = []
    for row, model in enumerate(SEQUENCE_AXES["model"]):
        for column, mode in enumerate(SEQUENCE_AXES["checkpointing"]):
            turn = row + column
            again = mode == ("selective" if row % 4 < 2 else "none")
            cell = Cell(model, adapters[turn % 2], mesh=meshes[turn % 3], checkpointing=mode)
            cells.append(replace(cell, compiled=mode in _COMPILED[model], sequence="again" if again else "kept"))
    cells.append(Cell("llama", "lora", checkpointing="selective", compiled=True, sequence="kept"))
    cells.append(Cell("llama", "lora", mesh="tp2", checkpointing="selective", compiled=True, sequence="again"))
    return cells


SEQUENCE = _sequence()


def _registry() -> list[Cell]:
    """Full and LoRA on two axes, with images where the model sees; on tp alone in turn, with text only."""
    cells = []
    for row, name in enumerate(FAMILIES):
        sees = name.endswith("ForConditionalGeneration")
        cells += [Cell(name, adapter, plan="registry", images=sees) for adapter in ("full", "lora")]
        cells += [Cell(name, ("full", "lora")[row % 2], mesh="tp2", plan="registry")]
    # the layers are found below the composite model
    checkpointed = Cell("Gemma3ForConditionalGeneration", "lora", mesh="tp2", checkpointing="full")
    return [*cells, replace(checkpointed, plan="registry", images=True)]


DERIVED = [
    Cell("gpt2", plan="derived"),  # Conv1D, q, k and v packed
    Cell("gpt2", "lora", mesh="tp2", plan="derived", overrides=(("vocab_size", 131),)),
    Cell("opt", mesh="tp2", plan="derived"),
    Cell("bloom", "lora", plan="derived"),  # ALiBi, q, k and v packed for each head
    Cell("mpt", mesh="tp2", plan="derived"),
    Cell("mamba", plan="derived"),  # no pairs: each projection on its own
]

#: llama and qwen2 have a plan, bert and modernbert get a derived one.
HEADS = [
    Cell("llama/sequence", "lora", mesh="tp2", plan="head"),
    Cell("qwen2/reward", mesh="tp2", plan="head"),
    Cell("llama/token", mesh="tp2", plan="head"),
    Cell("bert/sequence", "lora", mesh="tp2", plan="head"),
    Cell("modernbert/token", mesh="tp2", plan="head"),
    Cell("bert/masked", mesh="tp2", plan="head"),
    Cell("llama/sequence", plan="head"),
    Cell("qwen2/token", "lora", plan="head"),
    Cell("bert/token", plan="head"),
    Cell("modernbert/sequence", "lora", plan="head"),
    Cell("bert/sequence", mesh="fsdp2", plan="head"),
    Cell("modernbert/masked", mesh="fsdp2", plan="head"),
    Cell("llama/reward", "lora", mesh="fsdp2", plan="head"),
]

#: Also run with the oldest supported transformers.
BOTH_ENDS = {Cell(model, adapter) for model in ("llama_tied", "mixtral") for adapter in ("full", "lora")}

CORE = {
    # every mesh in full and with LoRA; models that differ in a layer, the ends or the loss
    Cell("llama", mesh="tp2"),
    Cell("qwen3", "lora", mesh="tp2"),
    Cell("mixtral", mesh="tp2"),
    Cell("llama", "lora", mesh="fsdp2"),
    Cell("qwen3", mesh="fsdp2"),
    Cell("mixtral", "lora", mesh="fsdp2"),
    Cell("llama"),
    Cell("llama", "lora"),
    Cell("llama_tied"),
    Cell("llama_odd_vocab", "lora"),
    Cell("qwen3"),
    Cell("gemma3", "lora"),
    Cell("phi3"),
    Cell("mixtral_aux"),
    Cell("qwen3_moe", "lora"),
    Cell("llama", mesh="hsdp"),
    Cell("llama", mesh="ddp_like"),
    Cell("llama", "ends"),
    Cell("cohere", "lora", mesh="tp4"),
    # adapters
    *(Cell("llama", "dora", mesh=mesh) for mesh in ("tp2", "fsdp2", "tp2_fsdp2")),
    Cell("llama", "lora", overrides=_BIASES),
    Cell("llama", "saved_ends"),
    # checkpointing, compilation, dropout
    Cell("qwen3_moe", "full", 0.0, "fsdp2", "submodule", False),
    Cell("llama", "lora", 0.0, "hsdp", "selective", False),
    Cell("llama", "full", 0.0, "tp2", "full", True),
    Cell("qwen3_moe", "full", 0.0, "tp2_fsdp2", "selective", False),
    Cell("phi3", "full", 0.0, "tp2", "full", False),
    Cell("llama", compiled=True),
    Cell("llama", "lora", 0.1, "fsdp2", "full"),
    Cell("llama", "lora", 0.1, "tp2_fsdp2", "full"),
    # sequence parallelism
    Cell("llama", "lora", mesh="tp2", checkpointing="selective", sequence="again"),
    Cell("llama", mesh="tp2", compiled=True, sequence="kept"),
    Cell("llama", checkpointing="submodule", sequence="kept"),
    Cell("llama_tied", "lora", mesh="tp4", sequence="kept"),
    Cell("qwen3", mesh="tp2", checkpointing="own", sequence="kept"),
    Cell("mixtral", mesh="tp2", sequence="again"),
    Cell("olmo2", sequence="kept"),
    # plans of the registry, derived plans, heads
    Cell("Qwen3ForCausalLM", mesh="tp2", plan="registry"),
    Cell("Qwen3ForCausalLM", "lora", plan="registry"),
    Cell("Gemma3ForConditionalGeneration", plan="registry", images=True),
    Cell("FalconH1ForCausalLM", plan="registry"),
    Cell("gpt2", plan="derived"),
    Cell("opt", mesh="tp2", plan="derived"),
    Cell("bert/sequence", "lora", mesh="tp2", plan="head"),
    Cell("llama/sequence", plan="head"),
    Cell("bert/sequence", mesh="fsdp2", plan="head"),
}


def _table() -> list[Cell]:
    """All cells, each once, with their tiers."""
    cells = dict.fromkeys(
        [*_models(), *VOCABULARY, *ADAPTERS, *MATRIX, *STOCK, *SEQUENCE, *_registry(), *DERIVED, *HEADS]
    )
    if unknown := (CORE | BOTH_ENDS) - cells.keys():
        raise ValueError(f"tiers of cells that are not in the table: {', '.join(map(str, unknown))}")
    return [replace(c, tier="core" if c in CORE else "full", both_ends=c in BOTH_ENDS) for c in cells]


CELLS = _table()
