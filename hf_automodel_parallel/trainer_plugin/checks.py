"""Options of the Trainer that would silently give wrong results on a mesh."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from ..errors import ConfigError

if TYPE_CHECKING:
    from accelerate import Accelerator


def check_trainer(accelerator: Accelerator, trainer: Any) -> None:
    """Before a model is prepared for training.

    Raises:
        ConfigError: ``average_tokens_across_devices=False`` where ranks share batches. The Trainer then divides the
            number of tokens by the tp and cp sizes although it has not summed it, so that gradients would be that much
            too large. Checkpoints for the hub that would have no weights, or none yet. ``bf16_full_eval`` and
            ``fp16_full_eval`` beside data parallelism.
    """
    _check_hub(accelerator, trainer.args)
    for field in ("bf16_full_eval", "fp16_full_eval"):
        if getattr(trainer.args, field, False) and _has_data_parallel_ranks(accelerator):
            raise ConfigError(
                f"{field}=True casts the model when it is evaluated, and FSDP2 cannot gather parameters whose dtype "
                f"has changed. Use {field[:4]}=True (mixed precision), which evaluates in that dtype, too."
            )
    if getattr(trainer.args, "average_tokens_across_devices", True):
        return
    counts = getattr(trainer, "model_accepts_loss_kwargs", True) or getattr(trainer, "compute_loss_func", None)
    shared = accelerator.parallelism_config.non_data_parallel_size  # type: ignore[union-attr]
    if counts and shared > 1:
        raise ConfigError(
            f"average_tokens_across_devices=False with {shared} ranks to a batch (tp_size x cp_size): the Trainer "
            f"would make losses and gradients {shared} times too large. Leave it at True, its default."
        )


def _has_data_parallel_ranks(accelerator: Accelerator) -> bool:
    return accelerator.num_processes > accelerator.parallelism_config.non_data_parallel_size  # type: ignore[union-attr]


def _check_hub(accelerator: Accelerator, args: Any) -> None:
    if not getattr(args, "push_to_hub", False) or str(getattr(args.save_strategy, "value", args.save_strategy)) == "no":
        return
    strategy = str(getattr(args.hub_strategy, "value", args.hub_strategy))
    if strategy == "every_save" and "SHARDED_STATE_DICT" in str(accelerator.state.fsdp_plugin.state_dict_type):
        raise ConfigError(
            "hub_strategy='every_save' uploads the model of each checkpoint, which SHARDED_STATE_DICT does not write: "
            "there would be configs without weights on the hub. Use state_dict_type='FULL_STATE_DICT', or "
            "hub_strategy='end' or 'checkpoint'."
        )
    if "checkpoint" in strategy and getattr(accelerator.parallelism_config, "async_save", False):
        raise ConfigError(
            f"hub_strategy={strategy!r} uploads a checkpoint at once, async_save=True writes it later. Use one of the "
            "two."
        )
