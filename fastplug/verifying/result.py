"""What a verification found."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from fastplug.errors import FastPlugError

if TYPE_CHECKING:
    from rich.table import Table

Kind = Literal["loss", "output", "gradient"]


class VerifyError(FastPlugError, AssertionError):
    """The patched model does not compute what the original computes."""


@dataclass(frozen=True)
class Row:
    """One comparison.

    Attributes:
        name: The module or parameter, as in ``model.named_modules()`` and ``named_parameters()``.
        kind: ``loss``, ``output`` or ``gradient``.
        error: fastplug's error: the L2 norm of its difference to the truth over the truth's norm. The truth is the
            fp32 judge where there is one, else the original.
        original_error: The original's error to the judge; None where fastplug is compared with the original itself.
        limit: The largest error that passes.
        ok: Whether it passes.
        reason: Why not, where it is not just an error above the limit.
    """

    name: str
    kind: Kind
    error: float
    original_error: float | None
    limit: float
    ok: bool
    reason: str = ""

    @property
    def ratio(self) -> float | None:
        """fastplug's error over the original's; None without a judge."""
        if self.original_error is None:
            return None
        if self.original_error == 0.0:
            return 0.0 if self.error == 0.0 else float("inf")
        return self.error / self.original_error


@dataclass(frozen=True)
class VerifyResult:
    """What :func:`fastplug.verify` found.

    Attributes:
        rows: The comparisons, in the order of the model.
        dead: Trainable tensors that got no gradient, or one that is zero everywhere, in either run.
        notes: What the reader should know: what was changed for the comparison, which calls were not fused and why.
    """

    rows: tuple[Row, ...]
    dead: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()

    @property
    def ok(self) -> bool:
        return all(row.ok for row in self.rows)

    @property
    def failed(self) -> tuple[Row, ...]:
        return tuple(row for row in self.rows if not row.ok)

    def __bool__(self) -> bool:
        return self.ok

    def __str__(self) -> str:
        worst = max((row.ratio for row in self.rows if row.ratio is not None), default=None)
        text = f"fastplug verify: {'ok' if self.ok else 'MISMATCH'}, {len(self.rows)} comparisons"
        if worst is not None:
            text += f", largest error {worst:.2f}x the original's"
        if self.failed:
            text += f", {len(self.failed)} failed; {_sentence(self.failed[0])}"
        if self.dead:
            text += f"; {len(self.dead)} trainable tensors without a gradient, the first is {self.dead[0]}"
        return text

    def raise_if_failed(self) -> VerifyResult:
        """Itself if all is well.

        Raises:
            VerifyError: Naming the first mismatch and the way out.
        """
        if not self.ok:
            raise VerifyError(
                f"{self}. fastplug.undo(model) gives the original back; Options(disable=...) leaves a role alone"
            )
        return self

    def table(self, worst: int | None = None) -> Table:
        """The rows as a table for ``rich.print``: all, or those that failed and the ``worst`` of the others."""
        from rich.markup import escape
        from rich.table import Table

        table = Table("", "what", "compared", title=str(self), title_justify="left", title_style="")
        for heading in ("error", "original's", "ratio", "limit"):
            table.add_column(heading, justify="right")
        shown = self.rows
        if worst is not None:
            passed = sorted((row for row in shown if row.ok), key=lambda row: -row.error / (row.limit or 1.0))
            kept = {id(row) for row in (*self.failed, *passed[:worst])}
            shown = tuple(row for row in shown if id(row) in kept)
            table.caption = f"{len(shown)} of {len(self.rows)} comparisons, the worst ones"
        for row in shown:
            original = "" if row.original_error is None else f"{row.original_error:.1e}"
            ratio = "" if row.ratio is None else f"{row.ratio:.2f}"
            mark = "[green]ok[/]" if row.ok else "[bold red]NO[/]"
            name = f"{row.name}: {row.reason}" if row.reason else row.name
            table.add_row(mark, row.kind, escape(name), f"{row.error:.1e}", original, ratio, f"{row.limit:.1e}")
        return table


def _sentence(row: Row) -> str:
    why = row.reason or f"an error of {row.error:.1e}, allowed {row.limit:.1e}"
    return f"first the {row.kind} of {row.name}: {why}"
