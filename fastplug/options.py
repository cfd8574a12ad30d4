"""The options of fastplug: one frozen dataclass, the same keys as Python keywords, YAML keys and CLI flags."""

from __future__ import annotations

import difflib
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields, replace
from typing import Any, Literal, get_args

from fastplug.errors import OptionError

Role = Literal["decoder_layer", "attention", "mlp", "norm", "linear", "lm_head_loss"]
ROLES: tuple[str, ...] = get_args(Role)


@dataclass(frozen=True)
class Options:
    """What fastplug may do to a model.

    Attributes:
        strict: Raise :class:`~fastplug.errors.StrictError` when nothing could be patched or any site was refused.
        disable: Roles to leave alone, out of ``decoder_layer``, ``attention``, ``mlp``, ``norm``, ``linear``,
            ``lm_head_loss``.
        kernels: ``"auto"`` takes Triton where the device has it and the PyTorch references elsewhere;
            ``"triton"`` and ``"reference"`` force one of them.
        attention: ``"auto"`` lets an ``sdpa`` model use the fastest exact backend of its GPU for purely causal masks;
            ``"host"`` leaves the choice to PyTorch.
        graphs: ``"auto"`` replays decoder layers as CUDA graphs where a training step is too short to hide the
            launching of its kernels and nothing changes from step to step; ``"on"`` does so at any length, ``"off"``
            never.
        residual_dtype: ``"bfloat16"``, ``"float16"`` or ``"float32"`` casts the residual stream as it enters the
            decoder layers; None keeps the host's. (PEFT's ``prepare_model_for_kbit_training`` makes it float32.)
        compute: ``"exact"`` computes the frozen base in the host's 16 bits. On GPUs with FP8 products (compute
            capability 8.9 and newer), ``"fp8_backward"`` keeps the forward exact and computes the gradients of
            activations in FP8, and what gradient checkpointing computes again; ``"fp8"`` the forward too. Adapters,
            norms, attention, head and loss stay exact. See docs/fp8.md for what that costs in quality.
        exact: With FP8, names of linear modules that stay exact all the same, with wildcards: ``("*.down_proj",)``.
        fp8_weights: ``"kept"`` keeps the base in FP8 beside its own format, a byte a weight for each direction,
            ``"decoded"`` quantizes it anew for each product, ``"auto"`` keeps weights while half of the device's
            memory stays free, but not under ``memory``.
        base_weights: Of a quantized base: ``"decoded"`` decodes its weights for each product; ``"kept"`` decodes them
            once and keeps them in the compute dtype beside their own format, which takes as many bytes as a 16-bit
            base; ``"auto"`` keeps weights while half of the device's memory stays free, under ``memory`` as many as
            the plan leaves room for; ``"once"`` keeps what a backward has decoded until the next forward, in the memory
            that activations have left, and does what ``"auto"`` does under ``memory``. None is ``"once"``, without a
            budget of ``memory`` in backwards that begin with half of a GPU's memory free.
        memory: Plan what each decoder layer keeps for its backward: the fastest training step within ``"auto"`` (what
            is free on the device), an amount such as ``"8GiB"`` or a fraction of the device such as 0.9, both counted
            as reserved memory plus the CUDA context. ``"keep"`` lets every layer keep all it can use, ``"full"`` has it
            compute all of it again. Gradient checkpointing of the host is then a permission and no order. None plans
            nothing.
        headroom: What the plan leaves of ``memory`` to others: an evaluation, a generation, a server on the device. An
            amount or a fraction of the device; by default none, but with ``"auto"`` a twentieth of the device.
        memory_plan: The path of a saved plan, or of a checkpoint that has one, to train by in the place of a new one.
        plugins: Whether packages that register the entry-point group ``fastplug`` take part.
    """

    strict: bool = False
    disable: tuple[Role, ...] = ()
    kernels: Literal["auto", "triton", "reference"] = "auto"
    attention: Literal["auto", "host"] = "auto"
    graphs: Literal["auto", "on", "off"] = "auto"
    residual_dtype: Literal["bfloat16", "float16", "float32"] | None = None
    compute: Literal["exact", "fp8_backward", "fp8"] = "exact"
    exact: tuple[str, ...] = ()
    fp8_weights: Literal["auto", "kept", "decoded"] = "auto"
    base_weights: Literal["auto", "kept", "decoded", "once"] | None = None
    memory: str | float | None = None
    headroom: str | float | None = None
    memory_plan: str | None = None
    plugins: bool = True

    def __post_init__(self) -> None:
        if isinstance(self.disable, str):
            object.__setattr__(self, "disable", (self.disable,))
        object.__setattr__(self, "disable", tuple(self.disable))
        if isinstance(self.exact, str):
            object.__setattr__(self, "exact", (self.exact,))
        object.__setattr__(self, "exact", tuple(self.exact))
        for role in self.disable:
            _require_one_of("disable", role, ROLES)
        for name in ("strict", "plugins"):
            if not isinstance(getattr(self, name), bool):
                raise OptionError(f"fastplug: {name} must be true or false, not {getattr(self, name)!r}")
        _require_one_of("kernels", self.kernels, ("auto", "triton", "reference"))
        _require_one_of("attention", self.attention, ("auto", "host"))
        _require_one_of("graphs", self.graphs, ("auto", "on", "off"))
        _require_one_of("residual_dtype", self.residual_dtype, ("bfloat16", "float16", "float32", None))
        _require_one_of("compute", self.compute, ("exact", "fp8_backward", "fp8"))
        _require_one_of("fp8_weights", self.fp8_weights, ("auto", "kept", "decoded"))
        _require_one_of("base_weights", self.base_weights, ("auto", "kept", "decoded", "once", None))
        if self.exact and self.compute == "exact":
            raise OptionError(
                "fastplug: exact names what stays exact under compute='fp8' or 'fp8_backward'; set compute"
            )
        _check_memory(self)

    @classmethod
    def of(
        cls, options: Options | Mapping[str, Any] | None = None, *, also: Sequence[str] = (), **overrides: Any
    ) -> Options:
        """Options from an instance, a mapping (say from YAML) or nothing, with keyword overrides.

        ``also`` names what the caller takes beside these options, so that a message about an unknown one can name it.

        Raises:
            OptionError: For an unknown key, naming the nearest known one, or an impossible value.
        """
        if isinstance(options, Options):
            given: dict[str, Any] = {}
        elif options is None or isinstance(options, Mapping):
            given = dict(options or {})
            options = cls()
        else:
            raise OptionError(f"fastplug: options must be fastplug.Options or a mapping, not {type(options).__name__}")
        given.update(overrides)
        known = [field.name for field in fields(cls)]
        for key in given:
            if key not in known:
                nearest = difflib.get_close_matches(str(key), [*known, *also], n=1, cutoff=0.4)
                hint = f"did you mean {nearest[0]!r}?" if nearest else f"known options: {', '.join([*known, *also])}"
                raise OptionError(f"fastplug: unknown option {key!r}; {hint}")
        return replace(options, **given)

    def as_dict(self) -> dict[str, Any]:
        """The options as plain values, for JSON and YAML."""
        return asdict(self)


def _check_memory(options: Options) -> None:
    if options.memory is not None or options.headroom is not None:
        from fastplug.memory import budget

        budget.check(options.memory, options.headroom)
    if options.memory_plan is not None and not isinstance(options.memory_plan, str):
        raise OptionError(f"fastplug: memory_plan must be a path, not {options.memory_plan!r}")
    for name in ("headroom", "memory_plan"):
        if getattr(options, name) is not None and options.memory is None:
            raise OptionError(f"fastplug: {name} says something about a plan, and nothing is planned without memory=")


def _require_one_of(name: str, value: object, allowed: tuple[object, ...]) -> None:
    if value not in allowed:
        raise OptionError(f"fastplug: {name} cannot be {value!r}; one of {', '.join(map(repr, allowed))}")


__all__ = ["ROLES", "Options", "Role"]
