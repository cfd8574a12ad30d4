"""Train on one process and on two, in both hosts, with DDP and FSDP, LoRA and QLoRA, patched and not, and compare.

    python tests/distributed/two_gpus.py OUT            on two GPUs
    python tests/distributed/two_gpus.py OUT --cpu      on two gloo processes, a smaller model, in fp32

Every combination sees the same rows in each step, so all of a kind must have the same losses. The two processes stay
for all combinations; one that fails or hangs takes its processes with it, and the rest goes on in new ones. Writes
``two_gpus.json``, prints a table, and exits with the number of combinations that failed.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import shutil
import socket
import subprocess
import sys
import time
import traceback
from dataclasses import dataclass
from pathlib import Path
from typing import Any

STEPS, BATCH = 4, 4  # rows of all processes together
LINEARS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
RATE = 0.5


@dataclass(frozen=True)
class Run:
    """One training run; ``resume`` saves in the middle and goes on from there in a second run."""

    host: str
    strategy: str
    kind: str
    patched: bool
    resume: bool = False

    @property
    def name(self) -> str:
        return "-".join(
            (self.host, self.strategy, self.kind, "fastplug" if self.patched else "plain", *["resume"] * self.resume)
        )

    @classmethod
    def of(cls, name: str) -> Run:
        host, strategy, kind, patched, *resume = name.split("-")
        return cls(host, strategy, kind, patched == "fastplug", bool(resume))


def runs(world: int, cpu: bool) -> list[Run]:
    """What to run on so many processes."""
    kinds, both = ("lora", "qlora"), (True, False)
    if world == 1:
        return [Run(host, "single", kind, patched) for host in ("hf", "pl") for kind in kinds for patched in both]
    strategies = {"hf": ("ddp", "fsdp2"), "pl": ("ddp", "fsdp2") if cpu else ("ddp", "fsdp2", "fsdp1")}
    found = []
    for host, names in strategies.items():
        for strategy in names:
            found += [Run(host, strategy, kind, patched) for kind in kinds for patched in both]
            if strategy != "fsdp1":
                found += [Run(host, strategy, "lora", True, True)]
    return found


# --- the model and its rows -------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Size:
    width: int
    layers: int
    vocabulary: int
    length: int
    dtype: str


GPU = Size(1024, 4, 32000, 256, "bfloat16")
CPU = Size(64, 2, 288, 16, os.environ.get("TWO_GPUS_CPU_DTYPE", "float32"))


def build(kind: str, size: Size, device: Any) -> Any:
    """A small Llama with LoRA over dense or NF4 weights, stored as FSDP needs them; the same on every process."""
    import torch
    import transformers
    from peft import LoraConfig, get_peft_model

    dtype = getattr(torch, size.dtype)
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=size.vocabulary, hidden_size=size.width, intermediate_size=2 * size.width,
        num_hidden_layers=size.layers, num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=512,
        pad_token_id=0, bos_token_id=1, eos_token_id=2, tie_word_embeddings=False, dtype=size.dtype,
    )  # fmt: skip
    model = transformers.LlamaForCausalLM(config).to(dtype)
    model.requires_grad_(False)
    if kind == "qlora":
        quantize(model, device, dtype)
    model = get_peft_model(model, LoraConfig(r=8, lora_alpha=16, target_modules=LINEARS, task_type="CAUSAL_LM"))
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            torch.nn.init.normal_(parameter, std=0.05)
            parameter.data = parameter.data.to(dtype)  # one dtype for all: FSDP flattens or groups them
    if kind == "qlora":
        model.to(device)  # a dense model stays on the CPU until its host moves it
    return model.train()


def quantize(model: Any, device: Any, dtype: Any) -> None:
    import bitsandbytes as bnb
    import torch

    for module in list(model.modules()):
        for name, child in list(module.named_children()):
            if name in LINEARS:
                linear = bnb.nn.Linear4bit(
                    child.in_features, child.out_features, False, dtype, quant_type="nf4", quant_storage=dtype
                )
                linear.load_state_dict(child.state_dict())
                setattr(module, name, linear.to(device))
    model.requires_grad_(False)
    model.is_loaded_in_4bit = True
    torch.cuda.empty_cache()


def rows(size: Size) -> list[dict[str, Any]]:
    import torch

    generator = torch.Generator().manual_seed(1)
    tokens = torch.randint(3, size.vocabulary, (STEPS * BATCH, size.length), generator=generator)
    tokens[:, 1::2] = tokens[:, ::2]  # something to learn
    return [{"input_ids": row, "attention_mask": torch.ones_like(row), "labels": row} for row in tokens]


# --- the two hosts ----------------------------------------------------------------------------------------------------


class Worker:
    """One process of the run."""

    def __init__(self, out: Path, cpu: bool) -> None:
        import torch

        self.rank, self.world = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
        self.out, self.cpu, self.size = out, cpu, CPU if cpu else GPU
        self.device = torch.device("cpu") if cpu else torch.device("cuda", self.rank)
        if not cpu:
            torch.cuda.set_device(self.device)
        if self.world > 1:
            from datetime import timedelta

            device = {} if cpu else {"device_id": self.device}
            torch.distributed.init_process_group("gloo" if cpu else "nccl", timeout=timedelta(seconds=60), **device)

    def run(self, run: Run) -> dict[str, Any]:
        folder = self.out / "runs" / run.name
        train = self.hf if run.host == "hf" else self.pl
        model = build(run.kind, self.size, self.device)
        losses, evaluated = train(run, model, folder)
        found = {"losses": losses, **evaluated, **self.state(run, model)}
        if run.resume:
            saved = folder / f"checkpoint-{STEPS // 2}"
            model = build(run.kind, self.size, self.device)
            found["resumed"] = train(run, model, folder, saved)[0][-STEPS // 2 :]
            found["resumed_weights"] = self.state(run, model)["weights"]
        return found

    def state(self, run: Run, model: Any) -> dict[str, Any]:
        """What the model is after training: patched and sharded as it should be."""
        import torch

        import fastplug
        from fastplug.errors import FastPlugError

        found: dict[str, Any] = {}
        try:
            report = fastplug.report(model)
        except FastPlugError:
            report = None
        if report is not None:
            patched = [decision.role for decision in report.patched]
            found["sites"] = {role: patched.count(role) for role in sorted(set(patched))}
            found["refused"] = {d.name: d.reason for d in report.refused}
            found["fallbacks"] = report.fallbacks
            found["ops"], found["notes"] = report.ops, report.notes
        names = [type(module).__name__ for module in model.modules()]
        found["wrapped"] = names.count("FSDPLlamaDecoderLayer") or names.count("FullyShardedDataParallel")
        sharded = {"lora": 0, "base": 0}
        for name, parameter in model.named_parameters():
            if "layers." in name and "norm" not in name:
                flat = run.strategy == "fsdp1" and parameter.dim() == 1
                sharded["lora" if "lora_" in name else "base"] += hasattr(parameter, "device_mesh") or flat
        found["sharded"] = sharded
        if run.strategy != "fsdp1":
            weights = [p for name, p in model.named_parameters() if "lora_B" in name]
            whole = [w.full_tensor() if hasattr(w, "full_tensor") else w for w in weights]
            found["weights"] = [float(w.detach().float().cpu().double().norm()) for w in whole]
        if torch.cuda.is_available():
            found["peak_gib"] = round(torch.cuda.max_memory_allocated() / 2**30, 3)
        return found

    # --- the HF Trainer ---

    def hf(self, run: Run, model: Any, folder: Path, saved: Path | None = None) -> tuple[list[float], dict[str, float]]:
        from transformers import Trainer, TrainingArguments

        from fastplug_hf import FastPlugCallback

        if self.cpu and run.strategy == "fsdp2":
            let_accelerate_shard_on_a_cpu()
        sharding: dict[str, Any] = {}
        if run.strategy == "fsdp2":
            sharding["fsdp"] = True
            config = {"version": 2, "transformer_layer_cls_to_wrap": ["LlamaDecoderLayer"]}
            sharding["fsdp_config"] = {**config, "state_dict_type": "SHARDED_STATE_DICT"}
        arguments = TrainingArguments(
            output_dir=str(folder), max_steps=STEPS, logging_steps=1, report_to=[], disable_tqdm=True, seed=1,
            save_strategy="steps" if run.resume and saved is None else "no", save_steps=STEPS // 2, data_seed=1,
            per_device_train_batch_size=BATCH // self.world, per_device_eval_batch_size=BATCH // self.world,
            learning_rate=RATE, lr_scheduler_type="constant", warmup_steps=0, max_grad_norm=0.0, use_cpu=self.cpu,
            bf16=self.size.dtype != "float32", optim="adamw_torch" if run.resume else "sgd", **sharding,
            ddp_find_unused_parameters=False, dataloader_pin_memory=False,
        )  # fmt: skip
        if run.resume:
            arguments.learning_rate = 1e-3
        data = rows(self.size)
        trainer = Trainer(
            model=model,
            args=arguments,
            train_dataset=data,
            eval_dataset=data[:BATCH],
            callbacks=[FastPlugCallback()] if run.patched else [],
            compute_metrics=lambda p: {"accuracy": float((p.predictions[:, :-1] == p.label_ids[:, 1:]).mean())},
            preprocess_logits_for_metrics=lambda logits, labels: logits.argmax(-1),
        )
        trainer.train(resume_from_checkpoint=None if saved is None else str(saved))
        losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
        metrics = trainer.evaluate()
        return losses, {key: metrics[key] for key in ("eval_loss", "eval_accuracy")}

    # --- Lightning ---

    def pl(self, run: Run, model: Any, folder: Path, saved: Path | None = None) -> tuple[list[float], dict[str, float]]:
        import lightning.pytorch as pl
        import torch
        from torch.utils.data import DataLoader

        from fastplug_lightning import FastPlug

        module = lightning_module()(model, run)
        keep = pl.callbacks.ModelCheckpoint(
            folder, "checkpoint-{step}", every_n_train_steps=STEPS // 2, save_top_k=-1, auto_insert_metric_name=False,
            save_on_train_epoch_end=False,
        )  # fmt: skip
        keep.FILE_EXTENSION = ""
        save = run.resume and saved is None
        made = pl.Trainer(
            max_steps=STEPS, accelerator="cpu" if self.cpu else "gpu", devices=self.world, logger=False,
            strategy=self.strategy(run, pl), plugins=[FastPlug()] if run.patched else None,
            precision="32-true" if self.size.dtype == "float32" else "bf16-true", enable_progress_bar=False,
            enable_model_summary=False,
            callbacks=[keep] if save else [], enable_checkpointing=save, default_root_dir=str(folder),
            num_sanity_val_steps=0, use_distributed_sampler=False,
        )  # fmt: skip
        data = rows(self.size)
        if run.resume:  # Lightning starts an epoch's rows again
            data = data[:BATCH] * STEPS
        loader = DataLoader(data[self.rank :: self.world], batch_size=BATCH // self.world)  # type: ignore[arg-type]
        made.fit(module, loader, ckpt_path=None if saved is None else str(saved), **weights_only(made))
        losses = torch.tensor(module.losses, dtype=torch.float64, device=self.device)
        if self.world > 1:
            torch.distributed.all_reduce(losses)
        return (losses / self.world).tolist(), {}

    def strategy(self, run: Run, pl: Any) -> Any:
        from transformers.models.llama.modeling_llama import LlamaDecoderLayer

        if run.strategy == "ddp":
            return pl.strategies.DDPStrategy(find_unused_parameters=False)
        if run.strategy == "fsdp2":
            return pl.strategies.ModelParallelStrategy(
                data_parallel_size=self.world, tensor_parallel_size=1, save_distributed_checkpoint=True
            )
        if run.strategy == "fsdp1":
            return pl.strategies.FSDPStrategy(auto_wrap_policy={LlamaDecoderLayer}, use_orig_params=True)
        return "auto"


def lightning_module() -> Any:
    """The LightningModule; its class is made where Lightning is imported."""
    import lightning.pytorch as pl
    import torch

    class Module(pl.LightningModule):
        def __init__(self, llm: Any, run: Run) -> None:
            super().__init__()
            self.llm, self.of = llm, run
            self.losses: list[float] = []

        def configure_model(self) -> None:
            if self.of.strategy == "fsdp2" and not hasattr(self.llm, "unshard"):
                from torch.distributed.fsdp import fully_shard

                mesh = self.device_mesh["data_parallel"]
                for layer in self.llm.get_base_model().model.layers:
                    fully_shard(layer, mesh=mesh)
                fully_shard(self.llm, mesh=mesh)

        def training_step(self, batch: Any, index: int) -> Any:
            loss = self.llm(**batch).loss
            self.losses.append(float(loss.detach()))
            return loss

        def configure_optimizers(self) -> Any:
            trained = [p for p in self.llm.parameters() if p.requires_grad]
            return torch.optim.AdamW(trained, lr=1e-3) if self.of.resume else torch.optim.SGD(trained, lr=RATE)

    return Module


def weights_only(trainer: Any) -> dict[str, Any]:
    import inspect

    return {"weights_only": False} if "weights_only" in inspect.signature(trainer.fit).parameters else {}


def let_accelerate_shard_on_a_cpu() -> None:
    """accelerate asks for a GPU before it shards; nothing of what it then does needs one."""
    from accelerate import state
    from accelerate.utils import DistributedType

    original = state.AcceleratorState.__init__
    if getattr(original, "shards", False):
        return

    def __init__(self: Any, *args: Any, fsdp_plugin: Any = None, **kwargs: Any) -> None:
        original(self, *args, fsdp_plugin=fsdp_plugin, **kwargs)
        if fsdp_plugin is not None and self.distributed_type == DistributedType.MULTI_CPU:
            self.distributed_type, self.fsdp_plugin = DistributedType.FSDP, fsdp_plugin

    __init__.shards = True  # type: ignore[attr-defined]
    state.AcceleratorState.__init__ = __init__


def work(names: list[str], out: Path, cpu: bool) -> None:
    """What a process does: its runs in turn, one line of JSON each."""
    import faulthandler

    faulthandler.dump_traceback_later(float(os.environ["TWO_GPUS_LIMIT"]) - 2, exit=False)
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    import torch

    worker = Worker(out, cpu)
    for name in names:
        faulthandler.cancel_dump_traceback_later()
        faulthandler.dump_traceback_later(float(os.environ["TWO_GPUS_LIMIT"]) - 2, exit=False)
        start = time.perf_counter()
        try:
            found = worker.run(Run.of(name))
        except BaseException:
            note(out, worker, {"name": name, "error": traceback.format_exc()})
            os._exit(1)  # the other process may wait for this one
        note(out, worker, {"name": name, "seconds": round(time.perf_counter() - start, 1), **found})
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()
    sys.stdout.flush()
    os._exit(0)  # past the atexit handlers of three libraries for one process group


def note(out: Path, worker: Worker, entry: dict[str, Any]) -> None:
    with open(out / f"results-{worker.world}-{worker.rank}.jsonl", "a") as file:
        file.write(json.dumps(entry) + "\n")


# --- the launcher -----------------------------------------------------------------------------------------------------


class Group:
    """The processes of one world size, replaced by new ones after a failure."""

    def __init__(self, world: int, names: list[str], out: Path, cpu: bool, limit: float) -> None:
        self.world, self.names, self.out, self.cpu, self.limit = world, names, out, cpu, limit
        self.failed: dict[str, str] = {}
        self.processes: list[subprocess.Popen[bytes]] = []
        self.attempt = 0
        self.start()

    def file(self, rank: int) -> Path:
        return self.out / f"results-{self.world}-{rank}.jsonl"

    def results(self, rank: int = 0) -> list[dict[str, Any]]:
        file = self.file(rank)
        return [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []

    def left(self) -> list[str]:
        done = {entry["name"] for entry in self.results() if "error" not in entry}
        return [name for name in self.names if name not in done and name not in self.failed]

    def start(self) -> None:
        left = self.left()
        self.since, self.seen = time.monotonic(), len(left)
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        self.processes = []
        for rank in range(self.world):
            shared = {
                "RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": self.world, "LOCAL_WORLD_SIZE": self.world,
                "GROUP_RANK": 0, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "TWO_GPUS_LIMIT": self.limit,
            }  # fmt: skip
            environment = {**os.environ, **{key: str(value) for key, value in shared.items()}}
            environment["PYTHONPATH"] = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
            if self.world > 1:
                environment["TORCHELASTIC_RUN_ID"] = "two_gpus"  # how Lightning knows that somebody else launched it
            else:  # accelerate takes any rank in the environment for a distributed run
                for key in shared:
                    if key != "TWO_GPUS_LIMIT":
                        environment.pop(key, None)
                environment["CUDA_VISIBLE_DEVICES"] = environment.get("CUDA_VISIBLE_DEVICES", "0").split(",")[0]
            log = open(self.out / f"log-{self.world}-{rank}-{self.attempt}.txt", "wb")  # noqa: SIM115
            command = [sys.executable, __file__, str(self.out), "--work", *left, *["--cpu"] * self.cpu]
            self.processes.append(subprocess.Popen(command, env=environment, stdout=log, stderr=log, cwd=ROOT))
        self.attempt += 1

    def poll(self) -> bool:
        """Look after the processes; whether they are done."""
        left = self.left()
        if len(left) < self.seen:
            self.since, self.seen = time.monotonic(), len(left)
        codes = [process.poll() for process in self.processes]
        if not left and all(code is not None for code in codes):
            return True
        hung = time.monotonic() - self.since > self.limit
        if any(code not in (None, 0) for code in codes) or all(code is not None for code in codes) or hung:
            time.sleep(1.0)  # the others may still write what happened to them
            self.stop()
            left = self.left()
            if left:
                self.failed[left[0]] = self.why(left[0], hung)
                if len(left) > 1:
                    self.start()
            return len(left) <= 1
        return False

    def why(self, name: str, hung: bool) -> str:
        errors = [(rank, entry) for rank in range(self.world) for entry in self.results(rank) if "error" in entry]
        errors = [(rank, entry) for rank, entry in errors if entry["name"] == name] or errors[-1:]
        if errors and not hung:
            tails = (f"rank {rank}: " + "\n".join(e["error"].strip().splitlines()[-14:]) for rank, e in errors)
            return "\n".join(tails)
        logs = sorted(self.out.glob(f"log-{self.world}-*-{self.attempt - 1}.txt"))
        tails = ["\n".join(log.read_text(errors="replace").splitlines()[-25:]) for log in logs]
        return ("hung\n" if hung else "the process ended\n") + "\n---\n".join(tails)

    def stop(self) -> None:
        for process in self.processes:
            if process.poll() is None:
                process.kill()
            process.wait()


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("--cpu", action="store_true", help="two gloo processes, a smaller model, fp32")
    parser.add_argument("--only", nargs="*", default=[], help="parts of names of runs, '+' joins parts of one name")
    parser.add_argument("--exactly", action="store_true", help="take what --only gives for whole names")
    parser.add_argument("--limit", type=float, help="seconds that one run may take (60; 200 with --cpu)")
    parser.add_argument("--total", type=float, help="seconds that all may take (170; 600 with --cpu)")
    parser.add_argument("--work", nargs="*", help=argparse.SUPPRESS)
    options = parser.parse_args()
    options.limit = options.limit or (200.0 if options.cpu else 60.0)
    options.total = options.total or (600.0 if options.cpu else 170.0)
    if options.work is not None:
        work(options.work, options.out, options.cpu)
        return 0
    options.out.mkdir(parents=True, exist_ok=True)
    for old in [*options.out.glob("results-*.jsonl"), *options.out.glob("log-*.txt")]:
        old.unlink()
    shutil.rmtree(options.out / "runs", ignore_errors=True)
    start = time.monotonic()

    def wanted(run: Run) -> bool:
        if options.exactly:
            return run.name in options.only
        return not options.only or any(all(part in run.name for part in only.split("+")) for only in options.only)

    groups = []
    for world in (2, 1):
        names = [run.name for run in runs(world, options.cpu) if wanted(run)]
        if names:
            groups.append(Group(world, names, options.out.resolve(), options.cpu, options.limit))
    pending = list(groups)
    while pending and time.monotonic() - start < options.total:
        pending = [group for group in pending if not group.poll()]
        time.sleep(0.2)
    for group in pending:
        group.stop()
    found = {entry["name"]: entry for group in groups for entry in group.results() if "error" not in entry}
    failed = {name: why for group in groups for name, why in group.failed.items()}
    failed |= {name: "no time left" for group in groups for name in group.left()}
    shutil.rmtree(options.out / "runs", ignore_errors=True)
    return judge(found, failed, options, time.monotonic() - start)


def judge(found: dict[str, Any], failed: dict[str, str], options: Any, seconds: float) -> int:
    """Print the table, write the JSON, and count what failed."""
    layers = (CPU if options.cpu else GPU).layers
    exact = options.cpu and CPU.dtype == "float32"
    print(f"{'run':32} {'wrapped':>7} {'sharded':>9} {'vs plain':>9} {'vs one':>9} {'s':>5}  losses")
    for name, entry in found.items():
        run = Run.of(name)
        entry["problems"] = problems = []
        plain = found.get(Run(run.host, run.strategy, run.kind, False).name)
        singles = [Run(run.host, "single", run.kind, patched).name for patched in (run.patched, not run.patched)]
        one = next((found[single] for single in singles if single in found), None)
        if run.resume:
            plain, one = None, None
            again = [*entry["resumed"], *entry["resumed_weights"]]
            pairs = list(zip(again, [*entry["losses"][-STEPS // 2 :], *entry["weights"]]))
            apart = max(abs(a - b) / abs(b) for a, b in pairs)
            entry["vs_resumed"] = apart
            if len(entry["resumed"]) != STEPS // 2 or not apart <= (
                2e-5 if options.cpu and CPU.dtype == "float32" else 2e-3
            ):
                problems.append(f"resumed differently: {apart:.1e}, {entry['resumed']}")
        # Under FSDP2, accelerate rounds the loss itself to bf16.
        bound = 2e-5 if exact else 1e-2 if (run.host, run.strategy) == ("hf", "fsdp2") else 4e-3
        for key, other in (("vs_plain", plain), ("vs_one", one)):
            entry[key] = None
            if other is None or other is entry:
                continue
            pairs = [*zip(entry["losses"], other["losses"]), *zip(entry.get("weights", []), other.get("weights", []))]
            entry[key] = max(abs(a - b) / abs(b) for a, b in pairs)
            if not entry[key] <= bound or len(entry["losses"]) != len(other["losses"]):
                problems.append(f"{key} {entry[key]:.1e} > {bound:.0e}")
        if run.patched:
            sites = entry.get("sites", {})
            if sites.get("decoder_layer") != layers or sites.get("lm_head_loss") != 1:
                problems.append(f"sites {sites}")
            problems += [f"refused {entry['refused']}"] if entry.get("refused") else []
            problems += [f"fallbacks {entry['fallbacks']}"] if entry.get("fallbacks") else []
            if not options.cpu and set(entry.get("ops", {}).values()) != {"triton"}:
                problems.append(f"ops {entry.get('ops')}")
        if run.strategy.startswith("fsdp"):
            linears = layers * len(LINEARS)
            if entry["wrapped"] < layers:
                problems.append(f"{entry['wrapped']} layers wrapped")
            if entry["sharded"] != {"lora": 2 * linears, "base": linears}:
                problems.append(f"sharded {entry['sharded']}")
        shown = " ".join(f"{loss:.4f}" for loss in entry["losses"])
        sharded = "/".join(str(count) for count in entry["sharded"].values())
        versus = ["" if entry[key] is None else f"{entry[key]:.1e}" for key in ("vs_plain", "vs_one")]
        print(f"{name:32} {entry['wrapped']:7} {sharded:>9} {versus[0]:>9} {versus[1]:>9} {entry['seconds']:5} ", shown)
        for remark in entry.get("notes", []):
            print(f"    note: {remark[:300]}")
        for problem in problems:
            print(f"    FAILED: {str(problem)[:600]}")
    for name, why in failed.items():
        print(f"{name}: FAILED\n" + "\n".join(f"    {line}" for line in why.splitlines()))
    bad = len(failed) + sum(bool(entry["problems"]) for entry in found.values())
    print(f"{len(found) + len(failed)} runs, {bad} failed, {seconds:.0f} s")
    with open(options.out / "two_gpus.json", "w") as file:
        json.dump({"runs": found, "failed": failed, "seconds": seconds, "cpu": options.cpu}, file, indent=1)
    return bad


ROOT = Path(__file__).resolve().parents[2]

if __name__ == "__main__":
    sys.exit(main())
