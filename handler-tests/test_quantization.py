"""QUANTIZATION, and checkpoints that are quantized: the demo model at 8 and 4 bits still answers word for word, and says what it is."""
from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import pytest

from harness import packed, questions
from harness.program import Server, run


@pytest.fixture(scope="module", params=["wint8", "WINT4"])
def quantized(request):
    with Server("serve", "--model", "demo", env={"QUANTIZATION": request.param}) as server:
        yield request.param.lower(), server


def test_every_question_is_answered_word_for_word(http, quantized):
    strategy, server = quantized

    def ask(question) -> str:
        response = http.post(f"{server.base}/v1{question.route}", json=question.request())
        assert response.status_code == 200, response.text
        return questions.text(response.json())

    with ThreadPoolExecutor(8) as pool:
        answers = list(pool.map(ask, questions.ALL))
    wrong = {question.name: answer for question, answer in zip(questions.ALL, answers) if answer != question.answer}
    assert len(questions.ALL) > 50 and not wrong, f"{strategy}: {len(wrong)} of {len(answers)}: {wrong}"


def test_activations_of_bf16(http):
    """Where the processor is no faster with bf16 this is the plain model, and the log says so."""
    with Server("serve", "--model", "demo", env={"DTYPE": "bfloat16"}) as server:
        wrong = {}
        for question in questions.ALL:
            answer = questions.text(http.post(f"{server.base}/v1{question.route}", json=question.request()).json())
            if answer != question.answer:
                wrong[question.name] = answer
        assert not wrong
        log = server.log
    assert ("bf16 activations" in log) != ("DTYPE=bfloat16 has no effect" in log), log


def test_the_model_card_names_it(http, quantized, server):
    strategy, other = quantized
    card = http.get(f"{other.base}/v1/models").json()["data"][0]
    assert card["quantization"] == strategy and "8-bit (Q8_0 form)" in card["weights"]
    plain = http.get(f"{server.base}/v1/models").json()["data"][0]
    assert plain["quantization"] is None and plain["weights"] == "bf16"


@pytest.mark.parametrize(("strategy", "form"), [("wint8", "8-bit (Q8_0 form)"), ("wint4", "4-bit (Q4_K form) and 8-bit (Q8_0 form)")])
def test_check_names_it(strategy, form):
    done = run("check", "--model", "demo", "--quantization", strategy)
    assert done.process.returncode == 0, done.log
    assert f"QUANTIZATION = {strategy}  [flag]" in done.stdout and f"weights held as: {form}" in done.stdout, done.log


@pytest.mark.parametrize(
    "strategy",
    ["wint2", "block_wise_fp8", "w4afp8", "w8a8", "w4a8", "wfp8afp8", "tensor_wise_fp8", '{"dense_quant_type": "wint8", "moe_quant_type": "wint4"}'],
)
def test_other_strategies_are_refused_by_name_with_those_that_work(strategy):
    done = run("check", "--model", "demo", env={"QUANTIZATION": strategy})
    assert done.process.returncode == 1, done.log
    named = "mix_quant" if strategy.startswith("{") else f"FastDeploy's {strategy} "
    assert "QUANTIZATION: " in done.log and named in done.log and "use BF16 (weights as stored), wint8 or wint4" in done.log, done.log


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    return packed.write(tmp_path_factory.mktemp("packed"))


@pytest.mark.parametrize("strategy", ["", "unquantized"])
def test_a_quantized_checkpoint_answers_word_for_word(http, checkpoint, strategy):
    with Server("serve", "--model", str(checkpoint), env={"QUANTIZATION": strategy}) as server:

        def ask(question) -> str:
            response = http.post(f"{server.base}/v1{question.route}", json=question.request())
            assert response.status_code == 200, response.text
            return questions.text(response.json())

        with ThreadPoolExecutor(8) as pool:
            answers = list(pool.map(ask, questions.ALL))
        wrong = {question.name: answer for question, answer in zip(questions.ALL, answers) if answer != question.answer}
        assert not wrong, f"{len(wrong)} of {len(answers)}: {wrong}"


@pytest.mark.parametrize(
    ("strategy", "held"),
    [("", "8-bit (Q8_0 form); embedding and head bf16"), ("unquantized", "f32; embedding and head bf16"), ("wint8", "8-bit (Q8_0 form)")],
)
def test_check_says_how_a_quantized_checkpoint_is_stored_and_held(checkpoint, strategy, held):
    done = run("check", "--model", str(checkpoint), env={"QUANTIZATION": strategy})
    assert done.process.returncode == 0, done.log
    assert "quantized by compressed-tensors: " in done.stdout and " matrices of 8 bits" in done.stdout, done.log
    assert f"weights held as: {held}" in done.stdout, done.log
    assert "plain numbers" not in done.log, done.log


def test_a_broken_quantized_checkpoint_is_named_by_file_and_tensor(tmp_path):
    name = "model.layers.1.mlp.down_proj.weight"
    done = run("check", "--model", str(packed.write(tmp_path, without=f"{name}_scale")))
    assert done.process.returncode == 1, done.log
    assert "weights file model.safetensors of " in done.log, done.log
    assert f"tensor {name}: it is packed by compressed-tensors, and {name}_scale is missing" in done.log, done.log
    config = tmp_path / "config.json"
    config.write_text(config.read_text().replace("int-quantized", "marlin-24"))
    done = run("check", "--model", str(tmp_path))
    assert done.process.returncode == 1 and 'quantization_config, "format": "marlin-24" is not supported' in done.log, done.log
