"""Options: the same keys from Python, a mapping and the command line; mistakes are answered with the way out."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest

import fastplug
from fastplug import OptionError, Options


@pytest.mark.parametrize(
    ("given", "hint"),
    [
        ({"stict": True}, "unknown option 'stict'; did you mean 'strict'?"),
        ({"kernel": "auto"}, "did you mean 'kernels'?"),
        ({"residual": "float32"}, "did you mean 'residual_dtype'?"),
        ({"qqq": 1}, "known options: "),
        ({"disable": "mpl"}, "disable cannot be 'mpl'; one of 'decoder_layer', 'attention', 'mlp'"),
        ({"kernels": "cuda"}, "kernels cannot be 'cuda'; one of 'auto', 'triton', 'reference'"),
        ({"residual_dtype": "int8"}, "residual_dtype cannot be 'int8'"),
        ({"strict": "yes"}, "strict must be true or false, not 'yes'"),
    ],
)
def test_a_wrong_option_names_the_way_out(given: dict[str, Any], hint: str) -> None:
    for call in (lambda: Options.of(given), lambda: Options.of(**given), lambda: Options.of(Options(), **given)):
        with pytest.raises(OptionError) as caught:
            call()
        assert hint in str(caught.value)
        assert "\n" not in str(caught.value)


def test_an_unknown_option_changes_no_model() -> None:
    from tests import models

    model = models.plain()
    for call in (lambda: fastplug.apply(model, kernel="auto"), lambda: fastplug.apply(model, {"kernel": "auto"})):
        with pytest.raises(OptionError, match="did you mean 'kernels'"):
            call()
    with pytest.raises(fastplug.ModelError, match="not patched"):
        fastplug.report(model)


def test_options_are_plain_values_and_frozen() -> None:
    options = Options.of({"disable": ["mlp", "norm"]}, strict=True)
    assert options == Options(strict=True, disable=("mlp", "norm"))
    assert Options.of(options.as_dict()) == options
    assert Options.of(options, strict=False).disable == ("mlp", "norm")
    assert Options(disable="mlp").disable == ("mlp",)  # type: ignore[arg-type]
    with pytest.raises(dataclasses.FrozenInstanceError):
        options.strict = False  # type: ignore[misc]
    with pytest.raises(OptionError, match=r"fastplug\.Options or a mapping, not list"):
        Options.of(["strict"])  # type: ignore[arg-type]
