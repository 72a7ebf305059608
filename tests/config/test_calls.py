# Copyright (c) the ConvNeXt V2 toolkit authors.
# Licensed under the MIT License; see LICENSE.
"""Names with arguments on the command line: what is read, and where an error points."""

from math import inf

import pytest

from config.calls import Call, is_named, parse_call, parse_named, parse_sum
from errors import UserError


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("focal", Call("focal")),
        ("focal()", Call("focal")),
        (" focal( gamma = 2 ) ", Call("focal", kwargs={"gamma": 2})),
        ("step(0.1, [1, 2e-3])", Call("step", (0.1, [1, 0.002]))),
        ("timm:resnet50.a1_in1k(k=1)", Call("timm:resnet50.a1_in1k", (), {"k": 1})),
        ("own.code:f(None, b=True, c=-1)", Call("own.code:f", (None,), {"b": True, "c": -1})),
        ("f(inf, -inf, [-inf], x=+inf)", Call("f", (inf, -inf, [-inf]), {"x": inf})),
        ("f(word, (x, [y]), 'a)b', {'k': 1})", Call("f", ("word", ("x", ["y"]), "a)b", {"k": 1}))),
    ],
)  # fmt: skip
def test_a_call_is_read(text, expected):
    assert parse_call(text, "--loss") == expected


def test_a_sum_has_factors_and_options():
    assert parse_sum("0.5*focal(gamma=2) + -1e-1 * bce", "--loss") == [
        Call("focal", kwargs={"gamma": 2}, factor=0.5),
        Call("bce", factor=-0.1),
    ]
    assert parse_sum("linear(0,1)[0.1]+cosine(1, 0) [0.9, fixed]", "--sched") == [
        Call("linear", (0, 1), options=(0.1,)),
        Call("cosine", (1, 0), options=(0.9, "fixed")),
    ]


def test_a_call_is_written_as_it_is_read():
    text = "own.code:f(1, 'word', key=[0.5])"
    assert parse_call(str(parse_call(text, "--loss")), "--loss") == parse_call(text, "--loss")
    assert str(Call("focal")) == "focal"


@pytest.mark.parametrize(
    ("text", "problem", "place"),
    [
        ("", "expected a name", 0),
        ("2", "expected a name", 0),
        ("focal(gamma=2", "'(' is not closed", 5),
        ("focal(gamma=2]", "expected ')'", 13),
        ("focal(gamma=2) bce", "expected '+' or the end", 15),
        ("focal +", "expected a name", 7),
        ("focal(gamma=1 2)", "expected values separated by commas", 12),
        ("focal(gamma=2*x)", "expected a number, a word or a list", 12),
        ("a(1) + b(1, f(2))", "expected a number, a word or a list", 12),
        ("focal(**{1: 2})", "expected values separated by commas", 5),
        ("focal(gamma=1, gamma=2)", "gamma is given twice", 15),
        ("a + b(1, {[2]: 3})", "expected a number, a word or a list", 9),
        ("linear(0,1)[x=2]", "expected values without names in [ ]", 15),
    ],
)
def test_an_error_points_at_the_character(text, problem, place):
    with pytest.raises(UserError) as error:
        parse_sum(text, "--sched")
    assert str(error.value) == f"--sched: {problem}\n  {text}\n  {' ' * place}^"


def test_one_call_is_not_a_sum():
    for text, place in (("a + b", 2), ("a[1]", 1), ("a a", 2), ("linear@layer4", 6)):
        with pytest.raises(UserError, match="expected the end, after one name, perhaps") as error:
            parse_call(text, "--model")
        assert str(error.value).endswith(f"\n  {text}\n  {' ' * place}^")
    with pytest.raises(UserError, match="expected a name"):
        parse_call("2 * a", "--model")


def test_arguments_and_options_have_places():
    call = parse_sum("a + f(1, [2], key = 3)[0.5, fixed]", "--sched")[1]
    assert (call.place, call.places, call.option_places) == (4, {0: 6, 1: 9, "key": 20}, (23, 28))


def test_named_values_are_separated_by_commas_outside_brackets():
    text = "main=focal(gamma=2, x=[1, 2]), aux = 0.4*ce + b('a,b')"
    assert parse_named(text, "--loss") == {
        "main": "focal(gamma=2, x=[1, 2])",
        "aux": "0.4*ce + b('a,b')",
    }
    assert is_named(text)
    assert not is_named("focal(gamma=2)")


@pytest.mark.parametrize(
    ("text", "problem", "place"),
    [
        ("main=ce, aux", "expected NAME=VALUE", 9),
        ("main=ce, main=bce", "main is given twice", 9),
        ("main=ce,", "expected NAME=VALUE", 8),
        ("", "expected NAME=VALUE", 0),
        ("0.5*a=ce", "expected NAME=VALUE", 0),
    ],
)
def test_an_error_in_named_values_points_at_the_character(text, problem, place):
    with pytest.raises(UserError) as error:
        parse_named(text, "--loss")
    assert str(error.value) == f"--loss: {problem}\n  {text}\n  {' ' * place}^"
