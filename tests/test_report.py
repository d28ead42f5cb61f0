from neutral import report
from neutral.schema.kinds import Dense, Parameter, Unknown
from neutral.schema.manifest import Manifest, Source

ZEROS = "0" * 64


def parameter(*shape: int, dtype: str = "float32", **more: object) -> Parameter:
    return Parameter.model_validate(
        {"axes": tuple("abcdef"[: len(shape)]), "shape": shape, "dtype": dtype, "sha256": ZEROS, **more}
    )


def manifest(*layers: Dense | Unknown) -> Manifest:
    return Manifest(source=Source(framework="torch", format="pt"), layers=layers, weights_digest=ZEROS)


def test_sizes_have_three_digits() -> None:
    sizes = {
        0: "0 B",
        999: "999 B",
        1000: "1.0 kB",
        99_499: "99.5 kB",
        999_499: "999 kB",
        10**9: "1.0 GB",
        5 * 10**15: "5000 TB",
    }
    assert {number: report.in_bytes(number) for number in sizes} == sizes


def test_what_is_tied_or_state_does_not_count_twice() -> None:
    layers = (
        Dense(path="a", parameters={"kernel": parameter(3, 4), "seen": parameter(dtype="int64", state=True)}),
        Dense(path="b", parameters={"kernel": parameter(3, 4, tied_to="a/kernel")}),
    )
    assert report.summary(manifest(*layers)) == "torch pt, 2 layers, 12 parameters, 56 B"


def test_one_row_per_parameter_and_the_layer_once() -> None:
    layers = (
        Dense(path="a", parameters={"kernel": parameter(3, 4, dtype="float8_e4m3fn"), "seen": parameter(state=True)}),
        Dense(path="b", parameters={"kernel": parameter(3, 4, tied_to="a/kernel")}),
        Unknown(path="empty"),
    )
    assert list(report.rows(manifest(*layers))) == [
        ("a", "dense", "kernel", "a b", "3×4", "float8_e4m3fn", "12 B"),
        ("", "", "seen (state)", "", "scalar", "float32", "4 B"),
        ("b", "dense", "kernel", "a b", "3×4", "float32", "= a/kernel"),
        ("empty", "unknown", "", "", "", "", ""),
    ]


def test_open_questions_name_the_option_that_answers_them() -> None:
    unknown = [Unknown(path=f"layer{n}\x1b[31m", parameters={"weight": parameter(3, 4)}) for n in range(7)]
    kinds, flatten = report.open_questions(manifest(*unknown, Dense(path="fc", undecided=("in",))))
    assert "7 layers" in kinds and "--kind" in kinds and "and 2 more" in kinds and "\x1b" not in kinds
    assert "fc" in flatten and "--flatten" in flatten
    assert not list(report.open_questions(manifest(Dense(path="fc"))))
    foreign, of_the_model = (Unknown(path=p, parameters={n: parameter(3, 4)}) for p, n in (("fc", "w"), ("", "weight")))
    kinds, template = report.open_questions(manifest(foreign, of_the_model))
    assert "(the model itself)" in kinds and "--kind" in kinds
    assert "(fc)" in template and "--kind" not in template and "template" in template
