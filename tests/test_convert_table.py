"""README's table of checkpoint formats: made from ``FORMATS``, each cell with a test behind it."""

from __future__ import annotations

from pathlib import Path

from tools.convert_checkpoint import parser

ROOT = Path(__file__).resolve().parents[1]
BEGIN, END = "<!-- formats: begin -->", "<!-- formats: end -->"
HF, LAYOUTS, RUNS = "test_convert_huggingface", "test_convert_layouts", "test_convert_runs"

#: Format -> (command, what holds, tests) into Megatron's torch_dist, and out of it.
FORMATS = {
    "Hugging Face Llama, Qwen2, Qwen3": (
        (
            "import-hf",
            "logits to 1e-4",
            {
                HF: ["test_megatron_computes_what_transformers_computes"],
                RUNS: ["test_any_layout_loads_an_imported_model"],
            },
        ),
        ("export-hf", "bit for bit", {HF: ["test_there_and_back_bit_for_bit"]}),
    ),
    "Hugging Face DeepSeek-V3: MLA, experts, MTP, yarn": (
        (
            "import-hf",
            "logits to 1e-4",
            {
                HF: [
                    "test_megatron_computes_what_transformers_computes",
                    "test_yarn",
                    "test_multi_token_prediction_there_and_back",
                    "test_transformer_engine_s_names_of_latent_attention",
                ]
            },
        ),
        (
            "export-hf",
            "bit for bit",
            {
                HF: [
                    "test_there_and_back_bit_for_bit",
                    "test_multi_token_prediction_there_and_back",
                ]
            },
        ),
    ),
    "a residual model of Megatron's": (
        (
            "upcycle",
            "logits to 1e-5",
            {
                HF: [
                    "test_an_upcycled_model_is_the_same_function",
                    "test_an_upcycled_prediction_is_the_same_function",
                ],
                LAYOUTS: [
                    "test_upcycling_carries_the_optimizer",
                    "test_a_hybrid_model_is_upcycled",
                ],
                RUNS: ["test_an_upcycled_run_goes_on", "test_an_upcycled_model_learns_no_worse"],
            },
        ),
        None,
    ),
    "an mHC model for transformers (`trust_remote_code`)": (
        None,
        ("export-hf", "logits to 1e-4", {HF: ["test_transformers_loads_and_generates"]}),
    ),
    "connections as DeepSeek-V4 and transformers' `deepseek_v4` have them": (
        (
            "import-deepseek-v4",
            "bit for bit",
            {LAYOUTS: ["test_out_and_in_again", "test_a_model_of_transformers_comes_in"]},
        ),
        (
            "export-deepseek-v4",
            "bit for bit",
            {LAYOUTS: ["test_out_and_in_again", "test_transformers_modules_take_what_is_exported"]},
        ),
    ),
    "connections as Megatron-LM's main and dev have them, GPT and hybrid": (
        (
            "import-megatron",
            "bit for bit",
            {
                LAYOUTS: [
                    "test_megatron_s_names_and_back",
                    "test_a_hybrid_model_has_names_of_its_own",
                    "test_the_development_branch_with_deepseek_v4_s_arithmetic",
                ]
            },
        ),
        (
            "export-megatron",
            "bit for bit",
            {
                LAYOUTS: [
                    "test_main_s_arithmetic_on_the_exported_tensors",
                    "test_the_first_development_branch_s_arithmetic",
                    "test_main_s_head_on_the_exported_tensors",
                ]
            },
        ),
    ),
}


def markdown() -> str:
    """The table."""
    lines = ["| format | into Megatron's torch_dist | out of it |", "|---|---|---|"]
    for name, cells in FORMATS.items():
        said = [f"`{cell[0]}`, {cell[1]}" if cell else "" for cell in cells]
        lines.append(f"| {name} | {said[0]} | {said[1]} |")
    return "\n".join(lines)


def test_readme_has_the_table() -> None:
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    assert text.count(BEGIN) == text.count(END) == 1
    assert text.split(BEGIN)[1].split(END)[0].strip() == markdown()


def test_every_cell_has_its_command_and_its_tests() -> None:
    for cells in FORMATS.values():
        for command, _, tests in filter(None, cells):
            assert parser().parse_known_args([command, "a", "b", *_required(command)])[0].run
            for file, names in tests.items():
                source = (ROOT / "tests" / f"{file}.py").read_text(encoding="utf-8")
                for name in names:
                    assert f"def {name}(" in source, f"{file}::{name}"


def _required(command: str) -> list[str]:
    if command == "import-deepseek-v4":
        return ["--base", "c"]
    return ["--layout", "main"] if command.endswith("-megatron") else []


if __name__ == "__main__":
    print(markdown())
