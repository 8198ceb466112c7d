"""The engine's argv and environment: what each setting becomes, what is refused, and that vLLM's own parser takes it."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from serve.arguments import NF4_PLUGIN, EngineSpec, ServedAdapter, build_command, build_environment, find_faults
from understudy.errors import EngineError, UsageError
from understudy.settings.serving import Serve


def make_spec(**changes: Any) -> EngineSpec:
    spec = EngineSpec(Path("/models/base"), "base-id", "d" * 64, [], Serve(), "127.0.0.1", 8300, "cpu", 8)
    return replace(spec, **changes)


def option(command: list[str], name: str) -> str:
    return command[command.index(name) + 1]


def test_command_serves_the_base_and_each_adapter_under_its_immutable_name() -> None:
    adapters = [ServedAdapter("a@0123456789ab", Path("/adapters/a=1"), 8), ServedAdapter("b@ba9876543210", Path("/adapters/b"), 24)]
    command = build_command(make_spec(adapters=adapters))
    assert command[:3] == [sys.executable, "-m", "vllm.entrypoints.openai.api_server"]
    assert option(command, "--served-model-name") == "base-id"
    assert option(command, "--host") == "127.0.0.1"
    assert option(command, "--max-lora-rank") == "32"  # vLLM's next one above 24
    modules = [json.loads(module) for module in command[command.index("--lora-modules") + 1 :]]
    assert [(module["name"], module["path"]) for module in modules] == [(each.name, str(each.path)) for each in adapters]


def test_command_takes_adapters_at_run_time_where_there_are_none_yet() -> None:
    command = build_command(make_spec())
    assert "--enable-lora" in command
    assert "--lora-modules" not in command
    assert build_environment(make_spec())["VLLM_ALLOW_RUNTIME_LORA_UPDATING"] == "True"
    assert int(option(command, "--max-cpu-loras")) >= int(option(command, "--max-loras"))


def test_cpu_settings_stay_off_a_gpu() -> None:
    cpu, gpu = build_command(make_spec()), build_command(make_spec(device="cuda"))
    assert "--enforce-eager" in cpu
    assert option(cpu, "--kv-cache-memory-bytes") == str(2 * 2**30)
    assert not {"--enforce-eager", "--kv-cache-memory-bytes", "--block-size", "--max-num-batched-tokens", "--max-num-seqs"} & set(gpu)
    assert option(gpu, "--gpu-memory-utilization") == "0.85"
    assert not {"LD_PRELOAD", "OMP_NUM_THREADS", "VLLM_CPU_OMP_THREADS_BIND"} & build_environment(make_spec(device="cuda")).keys()


def test_few_cores_are_all_used_and_many_are_bound_by_vllm() -> None:
    few, many = build_environment(make_spec(cores=2)), build_environment(make_spec(cores=64))
    assert (few["OMP_NUM_THREADS"], few["VLLM_CPU_OMP_THREADS_BIND"]) == ("2", "nobind")
    assert "OMP_NUM_THREADS" not in many
    assert "VLLM_CPU_OMP_THREADS_BIND" not in many


def test_openmp_is_preloaded_where_it_is_installed() -> None:
    assert build_environment(make_spec(openmp=Path("/lib/libiomp5.so")))["LD_PRELOAD"] == "/lib/libiomp5.so"
    assert "LD_PRELOAD" not in build_environment(make_spec(openmp=None))


def test_settings_win_over_the_device_default() -> None:
    for device in ("cpu", "cuda"):
        command = build_command(make_spec(device=device, settings=Serve(max_num_seqs=3, max_num_batched_tokens=128)))
        assert (option(command, "--max-num-seqs"), option(command, "--max-num-batched-tokens")) == ("3", "128")


def test_tools_are_called_where_their_parser_is_named() -> None:
    assert "--enable-auto-tool-choice" not in build_command(make_spec())
    command = build_command(make_spec(settings=Serve(tool_parser="hermes")))
    assert "--enable-auto-tool-choice" in command and option(command, "--tool-call-parser") == "hermes"


def test_engine_never_reaches_out() -> None:
    environment = build_environment(make_spec())
    assert environment["HF_HUB_OFFLINE"] == environment["VLLM_NO_USAGE_STATS"] == environment["DO_NOT_TRACK"] == "1"


def test_rank_beyond_vllms_largest_is_refused() -> None:
    with pytest.raises(EngineError, match="rank 512, not 600"):
        build_command(make_spec(adapters=[ServedAdapter("a@0", Path("/a"), 600)]))


# ---- options


def faults(device: str = "cuda", packages: frozenset[str] = frozenset(), **settings: Any) -> str:
    return "; ".join(find_faults(make_spec(device=device, settings=Serve(**settings), numa_nodes=1), packages))


def test_options_reach_vllm_only_where_they_are_not_its_defaults() -> None:
    plain = build_command(make_spec(device="cuda"))
    assert not [flag for flag in plain if "parallel" in flag or "quantization" in flag or "speculative" in flag or "structured" in flag or "sleep" in flag]
    settings = Serve(
        quantization="fp8", tensor_parallel=2, pipeline_parallel=3, data_parallel=4, prefix_caching=False, chunked_prefill=False,
        max_num_batched_tokens=4096, structured_outputs="guidance", sleep=True, dtype="float16", max_model_len=4096,
    )  # fmt: skip
    spec = make_spec(device="cuda", settings=settings, speculative_tokens=4)
    command = build_command(spec)
    assert (option(command, "--quantization"), option(command, "--dtype"), spec.precision) == ("fp8", "float16", "fp8")
    assert [option(command, f"--{kind}-parallel-size") for kind in ("tensor", "pipeline", "data")] == ["2", "3", "4"]
    assert {"--no-enable-prefix-caching", "--no-enable-chunked-prefill", "--enable-sleep-mode"} <= set(command) and "--enable-prefix-caching" not in command
    assert json.loads(option(command, "--structured-outputs-config")) == {"backend": "guidance"}
    assert json.loads(option(command, "--speculative-config"))["num_speculative_tokens"] == 4
    assert build_environment(spec)["VLLM_SERVER_DEV_MODE"] == "1"
    assert "VLLM_SERVER_DEV_MODE" not in build_environment(make_spec(device="cuda"))


def test_a_wish_for_speculation_is_no_order() -> None:
    assert "--speculative-config" not in build_command(make_spec(settings=Serve(speculative_tokens=4)))


def test_a_merged_adapter_is_served_alone_under_its_own_name() -> None:
    command = build_command(make_spec(merged="a@0123456789ab"))
    assert option(command, "--served-model-name") == "a@0123456789ab"
    assert not [flag for flag in command if "lora" in flag]


@pytest.mark.parametrize("quantization", ["fp8", "nf4"])
def test_the_cpu_quantises_nothing(quantization: str) -> None:
    assert quantization in faults("cpu", frozenset({NF4_PLUGIN}), quantization=quantization)
    with pytest.raises(UsageError, match=quantization):
        build_command(make_spec(settings=Serve.model_validate({"quantization": quantization})))


def test_nf4_on_a_gpu_needs_the_plugin() -> None:
    assert NF4_PLUGIN in faults(quantization="nf4")
    assert faults(packages=frozenset({NF4_PLUGIN}), quantization="nf4") == ""


@pytest.mark.parametrize("setting", ["tensor_parallel", "pipeline_parallel", "data_parallel"])
def test_the_cpu_runs_one_process_a_numa_node(setting: str) -> None:
    assert "NUMA" in faults("cpu", **{setting: 2})
    assert faults("cuda", **{setting: 2}) == ""
    assert find_faults(make_spec(settings=Serve.model_validate({setting: 2}), numa_nodes=2)) == []


def test_whole_prompts_need_room_in_a_step() -> None:
    assert "max_num_batched_tokens" in faults("cpu", chunked_prefill=False)
    assert faults("cpu", chunked_prefill=False, max_num_batched_tokens=2048) == ""
    assert faults("cuda", chunked_prefill=False) == ""


def test_sleep_is_for_gpus() -> None:
    assert "serve pause" in faults("cpu", sleep=True)


def test_every_fault_is_told_at_once() -> None:
    assert len(find_faults(make_spec(settings=Serve(quantization="fp8", sleep=True, tensor_parallel=8, chunked_prefill=False), numa_nodes=1))) == 4


PARSE = """
import json, sys
from vllm.entrypoints.launchers.cli_args import make_arg_parser, validate_parsed_serve_args
from vllm.utils.argparse_utils import FlexibleArgumentParser
parser = make_arg_parser(FlexibleArgumentParser())
parsed = []
for command in json.load(sys.stdin):
    args = parser.parse_args(command)
    validate_parsed_serve_args(args)
    parsed.append({name: str(value) for name, value in vars(args).items()})
json.dump(parsed, sys.__stdout__)
"""


@pytest.mark.slow
def test_vllms_own_parser_takes_every_option_and_means_the_same(tmp_path: Path) -> None:
    template = tmp_path / "t.jinja"
    template.write_text("{{ messages }}", encoding="utf-8")
    adapters = [ServedAdapter("a@0123456789ab", Path("/adapters/a=1"), 24)]
    everything = Serve(
        quantization="nf4", tensor_parallel=2, pipeline_parallel=2, data_parallel=2, prefix_caching=False, chunked_prefill=False, dtype="float16",
        max_num_batched_tokens=4096, max_num_seqs=7, structured_outputs="xgrammar", sleep=True, tool_parser="hermes", gpu_memory_utilization=0.5, max_loras=3,
    )  # fmt: skip
    specs = [
        make_spec(adapters=adapters),
        make_spec(merged="a@0123456789ab", device="cuda", settings=Serve(quantization="fp8")),
        make_spec(adapters=adapters, device="cuda", settings=everything, speculative_tokens=4, chat_template=template),
    ]
    commands = [build_command(spec, frozenset({NF4_PLUGIN}))[3:] for spec in specs]
    done = subprocess.run([sys.executable, "-c", PARSE], input=json.dumps(commands), capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    plain, merged, full = json.loads(done.stdout)
    assert (plain["enable_lora"], plain["max_lora_rank"], plain["enable_prefix_caching"], plain["enforce_eager"]) == ("True", "32", "True", "True")
    assert "a@0123456789ab" in plain["lora_modules"]
    assert (merged["quantization"], merged["enable_lora"], merged["served_model_name"]) == ("fp8", "None", "['a@0123456789ab']")
    assert (full["quantization"], full["dtype"], full["max_loras"], full["max_num_seqs"], full["tool_call_parser"]) == (
        "bitsandbytes",
        "float16",
        "3",
        "7",
        "hermes",
    )
    assert [full[f"{kind}_parallel_size"] for kind in ("tensor", "pipeline", "data")] == ["2", "2", "2"]
    assert (full["enable_prefix_caching"], full["enable_chunked_prefill"], full["enable_sleep_mode"]) == ("False", "False", "True")
    assert "xgrammar" in full["structured_outputs_config"] and "ngram" in full["speculative_config"]
    assert full["gpu_memory_utilization"] == "0.5"
