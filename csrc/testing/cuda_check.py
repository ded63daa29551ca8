"""What nvcc makes of the CUDA kernels: compiles each for every architecture, without a GPU, and checks the result.

    python csrc/testing/cuda_check.py              # compile, check, print the tables
    python csrc/testing/cuda_check.py --check      # and fail if docs/cuda_resources.md is stale
    python csrc/testing/cuda_check.py --write      # and update docs/cuda_resources.md

Every kernel must compile without warnings, spills, stack frames and atomics on floats. A kernel for many rows must also
reach half of the occupancy (general operators in float64: a quarter) and move its tokens by 16-byte accesses, and so
must those that read the logits of many tokens. One for long rows, which keeps a tile in registers while it waits, must
reach a quarter and have 16-byte loads. Needs nvcc, nvdisasm, c++filt and the headers of an installed torch, which may
be one for the CPU alone.
"""

import argparse
import importlib.util
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
DOCUMENT = ROOT / "docs" / "cuda_resources.md"
# How to get a tool that is missing. nvcc alone, without the headers of the same release, compiles nothing.
INSTALL = {
    "nvcc": (
        "pip install 'nvidia-cuda-nvcc==13.0.*' 'nvidia-cuda-runtime==13.0.*' 'nvidia-cuda-crt==13.0.*' "
        "'nvidia-cuda-cccl==13.0.*' 'nvidia-nvvm==13.0.*' nvidia-cuda-nvdisasm"
    ),
    "nvdisasm": "pip install nvidia-cuda-nvdisasm",
    "c++filt": "the binutils of your system",
}
# What torch.utils.cpp_extension adds to the flags of setup.py.
FLAGS = [
    *("-std=c++20", "-O3", "-DUSE_CUDA", "-Werror", "all-warnings", "-Xptxas", "-v", "--expt-relaxed-constexpr"),
    *("-D__CUDA_NO_HALF_OPERATORS__", "-D__CUDA_NO_HALF_CONVERSIONS__", "-D__CUDA_NO_HALF2_OPERATORS__"),
    *("-D__CUDA_NO_BFLOAT16_CONVERSIONS__", "-Xcompiler", "-fPIC,-fvisibility=hidden,-Wall"),
]


@dataclass(frozen=True)
class Architecture:
    """Limits of one SM: "Technical Specifications per Compute Capability" of the CUDA programming guide."""

    name: str
    warps: int
    blocks: int
    shared_kib: int


ARCHITECTURES = [
    Architecture("sm_80", warps=64, blocks=32, shared_kib=164),
    Architecture("sm_86", warps=48, blocks=16, shared_kib=100),
    Architecture("sm_89", warps=48, blocks=24, shared_kib=100),
    Architecture("sm_90", warps=64, blocks=32, shared_kib=228),
    Architecture("sm_100", warps=64, blocks=32, shared_kib=228),
    Architecture("sm_120", warps=48, blocks=24, shared_kib=100),
]
# The same for all of them.
REGISTERS_PER_SM = 65536
REGISTERS_PER_ALLOCATION = 256  # registers of a warp are handed out in such units
WARPS_PER_ALLOCATION = 4  # one warp for each of the four schedulers
SHARED_PER_ALLOCATION = 128
SHARED_OF_SYSTEM = 1024  # bytes of shared memory that the driver takes from every block
WARPS_PER_BLOCK = 8  # kThreads / 32, the same for every kernel
MANY_ROW_KERNELS = ("scan_rows<", "masked_mse_kernel<", "masked_mse_backward_kernel<")
# One token after another, each by a group of lanes.
TOKEN_KERNELS = ("categorical_values_kernel<", "categorical_value_loss_backward_kernel<")
LONG_ROW_KERNELS = ("scan_long_rows<",)
MIN_OCCUPANCY = 0.5
BYTES = {"half": 2, "bfloat16": 2, "float": 4, "double": 8}


class CheckError(Exception):
    """What stops the check, in one message for the user."""


class MissingToolError(CheckError):
    """A tool that is not there; allowed with --allow-missing."""


# ---- the tools ----


def run(*command: str | Path) -> str:
    """Return the standard output of a command."""
    done = subprocess.run(list(map(str, command)), capture_output=True, text=True)
    if done.returncode != 0:
        raise CheckError(f"{' '.join(map(str, command))} exited with {done.returncode}:\n{done.stdout}{done.stderr}")
    return done.stdout


def package_folders() -> list[Path]:
    """The bin folders of NVIDIA's Python packages, nvidia/cu13/bin or nvidia/cuda_nvcc/bin."""
    return [folder for path in sys.path for folder in sorted(Path(path or ".").glob("nvidia/cu*/bin"), reverse=True)]


def find_tool(name: str, first: list[Path]) -> Path:
    """Find an executable in some folders, on the PATH, then among the Python packages."""
    folders = [*map(str, first), *os.environ.get("PATH", "").split(os.pathsep), *map(str, package_folders())]
    found = shutil.which(name, path=os.pathsep.join(folders))
    if found is None:
        raise MissingToolError(
            f"cuda-check: there is no {name} in CUDA_HOME, on the PATH or among the Python packages of "
            f"{sys.executable}; install it: {INSTALL[name]}"
        )
    return Path(found)


@dataclass(frozen=True)
class Tools:
    """The programs, and what nvcc says about itself."""

    nvcc: Path
    nvdisasm: Path
    filt: Path
    version: str  # of nvcc, as in 13.0, V13.0.88
    known: frozenset[str]  # the architectures that nvcc has code for

    @classmethod
    def find(cls) -> "Tools":
        """Find every tool, or raise MissingToolError."""
        cuda_home = os.environ.get("CUDA_HOME")
        nvcc = find_tool("nvcc", [Path(cuda_home, "bin")] if cuda_home else [])
        # nvcc on the PATH may be a wrapper: its neighbours are where it really lives.
        dry_run = subprocess.run([nvcc, "--dryrun", "-x", "cu", os.devnull], capture_output=True, text=True).stderr
        here = re.search(r"_HERE_=(.*)", dry_run)
        version = re.search(r"release (\S+, V\S+)", run(nvcc, "--version"))
        if here is None or version is None:
            raise CheckError(f"{nvcc} does not answer like nvcc.")
        nvdisasm = find_tool("nvdisasm", [Path(here[1].strip())])
        known = frozenset(run(nvcc, "--list-gpu-code").split())
        return cls(nvcc, nvdisasm, find_tool("c++filt", []), version[1], known)


def torch_include() -> Path:
    """The headers of the installed torch, without importing it."""
    spec = importlib.util.find_spec("torch")
    if spec is None or not spec.submodule_search_locations:
        raise CheckError(f"cuda-check needs the headers of torch, and {sys.executable} has no torch: install it.")
    return Path(spec.submodule_search_locations[0], "include")


# ---- facts about a kernel ----


@dataclass
class Facts:
    """What ptxas and the machine code say about one kernel on one architecture."""

    registers: int = 0
    shared: int = 0  # static, bytes
    stack: int = 0  # bytes
    spills: int = 0  # bytes, stores and loads
    loads: set[int] = field(default_factory=set)  # widths of global loads, bits
    stores: set[int] = field(default_factory=set)
    float_atomics: set[str] = field(default_factory=set)  # opcodes
    wide_accesses: int = 0  # of 128 bits, on the path below
    loop_instructions: int = 0  # the fewest on a path once around the tile loop that makes all wide accesses


def read_ptxas(log: str) -> dict[str, Facts]:
    """Facts by mangled name from the output of ptxas -v."""
    facts: dict[str, Facts] = {}
    current = Facts()
    for line in log.splitlines():
        if entry := re.search(r"Compiling entry function '(\S+)'", line):
            current = facts[entry[1]] = Facts()
        elif frame := re.search(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads", line):
            current.stack = max(current.stack, int(frame[1]))
            current.spills = max(current.spills, int(frame[2]) + int(frame[3]))
        elif used := re.search(r"Used (\d+) registers", line):
            current.registers = int(used[1])
            shared = re.search(r"(\d+) bytes smem", line)
            current.shared = int(shared[1]) if shared else 0
    return facts


@dataclass(frozen=True)
class Instruction:
    """One instruction of a disassembly, say `@!P0 LDG.E.128 R4, desc[UR4][R30.64]`."""

    predicated: bool
    opcode: str
    operands: str

    @property
    def is_global_access(self) -> bool:
        """Whether it loads from or stores to global memory; atomics do not count."""
        return self.opcode.startswith(("LDG", "STG"))

    @property
    def width(self) -> int:
        """The bits of a load or store: LDG.E.128, LDG.E.U8, and 32 where nothing is said."""
        sizes = re.findall(r"\.[US]?(8|16|64|128|256)\b", self.opcode)
        return int(sizes[0]) if sizes else 32


class Code:
    """The instructions of one kernel with its labels."""

    def __init__(self) -> None:
        self.instructions: list[Instruction] = []
        self.labels: dict[str, int] = {}

    def branch_target(self, i: int) -> int | None:
        """Where instruction i jumps to, if it is a branch of its own. BRA.DIV is taken only by a warp that diverged."""
        instruction = self.instructions[i]
        label = re.search(r"`\(([^)]+)\)", instruction.operands)
        is_branch = instruction.opcode.split(".")[0] == "BRA" and instruction.opcode != "BRA.DIV"
        return self.labels.get(label[1]) if is_branch and label else None

    def successors(self, i: int) -> Iterator[int]:
        """The instructions that may follow instruction i."""
        instruction = self.instructions[i]
        target = self.branch_target(i)
        if target is not None:
            yield target
        # @P0 BRA `(.L_x_1) and BRA P0, `(.L_x_1) are both conditional.
        conditional = instruction.predicated or (target is not None and not instruction.operands.startswith("`"))
        ends = instruction.opcode.split(".")[0] in ("BRA", "BRX", "JMP", "EXIT", "RET")
        if conditional or not ends or instruction.opcode == "BRA.DIV":
            yield i + 1

    def cheapest_turn(self, first: int, last: int) -> tuple[int, int]:
        """Wide accesses and instructions of the best path from first to last, forwards only.

        The best makes the most wide accesses, and of those it is the shortest.
        """
        best: dict[int, tuple[int, int]] = {first: (0, 0)}
        for i in range(first, last + 1):
            if i not in best:
                continue
            instruction = self.instructions[i]
            wide = instruction.width // 128 if instruction.is_global_access else 0
            after = (best[i][0] - wide, best[i][1] + 1)
            if i == last:
                return -after[0], after[1]
            for successor in self.successors(i):
                if i < successor <= last:
                    best[successor] = min(best.get(successor, after), after)
        return 0, 0

    def tile_loop(self) -> tuple[int, int]:
        """Wide accesses and instructions of one turn of the loop with the most wide accesses, the innermost such."""
        turns = [(0, 0)]
        for last in range(len(self.instructions)):
            first = self.branch_target(last)
            if first is not None and first < last:
                turns.append(self.cheapest_turn(first, last))
        return min(turns, key=lambda turn: (-turn[0], turn[1]))


def read_sass(text: str) -> dict[str, Code]:
    """Code by mangled name from the output of nvdisasm."""
    codes: dict[str, Code] = {}
    code = Code()
    for line in text.splitlines():
        if section := re.match(r"//-+ \.text\.(\S+)", line):
            code = codes[section[1]] = Code()
        elif label := re.match(r"(\S+):$", line):
            code.labels[label[1]] = len(code.instructions)
        elif found := re.match(r"\s+/\*[0-9a-f]+\*/\s+(@\S+\s+)?([A-Z][\w.]*)\s*(.*?)\s*;", line):
            code.instructions.append(Instruction(found[1] is not None, found[2], found[3]))
    return codes


def add_code(facts: Facts, code: Code) -> None:
    """Add what the machine code says to what ptxas says."""
    accesses = [instruction for instruction in code.instructions if instruction.is_global_access]
    facts.loads = {access.width for access in accesses if access.opcode.startswith("LDG")}
    facts.stores = {access.width for access in accesses if access.opcode.startswith("STG")}
    facts.float_atomics = {x.opcode for x in code.instructions if re.match(r"(ATOM|RED)[GS.].*\.B?F\d", x.opcode)}
    facts.wide_accesses, facts.loop_instructions = code.tile_loop()


# ---- compiling ----


def compile_one(tools: Tools, source: Path, arch: Architecture, with_host: bool, folder: Path) -> dict[str, Facts]:
    """Compile one source for one architecture; with_host compiles the code of the host, too."""
    cubin = folder / f"{source.stem}.cubin"
    code = arch.name.replace("sm", "compute")
    outputs = (
        ["-c", "--keep", "--keep-dir", folder, "-o", folder / "object.o"] if with_host else ["-cubin", "-o", cubin]
    )
    target = ["-gencode", f"arch={code},code={arch.name}"]
    command = [tools.nvcc, *FLAGS, "-isystem", torch_include(), *target, *outputs, source]
    done = subprocess.run(list(map(str, command)), capture_output=True, text=True)
    if done.returncode != 0:
        log = [line for line in (done.stdout + done.stderr).splitlines() if "ptxas info" not in line]
        raise CheckError(f"{arch.name}: {source.relative_to(ROOT)} does not compile:\n" + "\n".join(log))
    facts = read_ptxas(done.stdout + done.stderr)
    codes = read_sass(run(tools.nvdisasm, "-c", cubin))
    for name in facts:
        if name not in codes:
            raise CheckError(f"{arch.name}: nvdisasm shows no code of {name}, which ptxas compiled.")
        add_code(facts[name], codes[name])
    return facts


Table = dict[str, dict[str, Facts]]  # kernel -> architecture -> facts


def compile_all(tools: Tools, sources: list[Path], architectures: list[Architecture], jobs: int) -> Table:
    """Compile all sources for all architectures, and the host's code of each source once."""
    with tempfile.TemporaryDirectory() as scratch, ThreadPoolExecutor(jobs) as pool:
        pending = []
        for arch in architectures:
            for source in sources:
                folder = Path(scratch, arch.name, source.stem)
                folder.mkdir(parents=True)
                with_host = arch is architectures[0]
                pending.append((arch, pool.submit(compile_one, tools, source, arch, with_host, folder)))
        try:
            results = [(arch.name, future.result()) for arch, future in pending]
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise
    mangled = sorted({name for _, facts in results for name in facts})
    readable = dict(zip(mangled, readable_names(tools, mangled), strict=True))
    table: Table = {}
    for arch_name, facts in results:
        for name, fact in facts.items():
            table.setdefault(readable[name], {})[arch_name] = fact
    return dict(sorted(table.items()))


def readable_names(tools: Tools, mangled: list[str]) -> list[str]:
    """Demangle kernel names and leave out namespaces and arguments: scan_rows<LambdaReturnOp<float>, 8>."""
    names = []
    for name in run(tools.filt, *mangled).splitlines():
        name = name.removeprefix("void ").replace("lambda_return::", "").replace("cuda::", "")
        depth = 0
        for end, character in enumerate(name):
            depth += (character == "<") - (character == ">")
            if character == "(" and depth == 0:
                name = name[:end]
                break
        name = name.replace("__half", "half").replace("__nv_bfloat16", "bfloat16").replace("> >", ">>")
        name = name.replace("(LossFamily)0", "Regression").replace("(LossFamily)1", "CrossEntropy")
        names.append(re.sub(r"unsigned (char|short|int|long)", r"u\1", name))
    return names


# ---- judging ----


def blocks_per_sm(facts: Facts, arch: Architecture) -> int:
    """How many blocks an SM can hold at a time, as the CUDA occupancy calculator counts."""

    def round_up(x: int, unit: int) -> int:
        return (x + unit - 1) // unit * unit

    registers_of_warp = round_up(facts.registers * 32, REGISTERS_PER_ALLOCATION)
    warps = REGISTERS_PER_SM // registers_of_warp // WARPS_PER_ALLOCATION * WARPS_PER_ALLOCATION
    shared_of_block = round_up(facts.shared + SHARED_OF_SYSTEM, SHARED_PER_ALLOCATION)
    return min(
        arch.blocks,
        arch.warps // WARPS_PER_BLOCK,
        warps // WARPS_PER_BLOCK,
        arch.shared_kib * 1024 // shared_of_block,
    )


def occupancy(facts: Facts, arch: Architecture) -> float:
    """The share of an SM's warps that can be resident."""
    return blocks_per_sm(facts, arch) * WARPS_PER_BLOCK / arch.warps


def is_for_many_rows(kernel: str) -> bool:
    """Whether this is a kernel in which many blocks each walk over tiles of tokens."""
    return kernel.startswith(MANY_ROW_KERNELS)


def min_occupancy(kernel: str) -> float:
    """What such a kernel must reach. The general operators in float64 are for checking the others."""
    if kernel.startswith(LONG_ROW_KERNELS) or re.search(r"(TdLambda|Categorical)\w*<double", kernel):
        return MIN_OCCUPANCY / 2
    return MIN_OCCUPANCY


def tokens_per_thread(kernel: str) -> int:
    """The kItems of csrc/cuda/items.cuh for a kernel for many rows."""
    return 4 if "double" in kernel else 8


def wide_accesses_of_tile(kernel: str) -> int:
    """How many 16-byte accesses one thread needs for its tokens of a tile; masks are narrower."""
    types = re.findall(r"\b(half|bfloat16|float|double)\b", kernel)  # masked_mse has two, values and targets
    matrices = [BYTES[name] for name in types]
    if "Backward" in kernel or "backward" in kernel or "LambdaReturnOp" in kernel or "TdLambdaOp" in kernel:
        matrices.append(BYTES[types[0]])  # the output
    accumulated = 8 if types[0] == "double" else 4
    if "CategoricalLoss" in kernel:
        matrices = 3 * [accumulated]  # values, rewards and returns; the logits are no tile's
    if "TdLambda" in kernel:
        matrices.append(accumulated)  # rewards, or their gradient
    if "TdLambdaLoss" in kernel:
        matrices.append(accumulated)  # losses, or their gradients
    if "Regression" in kernel:
        matrices.append(BYTES[types[0]])  # values of a step ago
    return tokens_per_thread(kernel) * sum(matrices) // 16


def instructions_per_token(kernel: str, facts: Facts) -> float | None:
    """In the tile loop, or None where its accesses do not say how many tokens one turn of it covers."""
    turns, rest = divmod(facts.wide_accesses, wide_accesses_of_tile(kernel))
    if turns == 0 or rest != 0:
        return None
    return facts.loop_instructions / (turns * tokens_per_thread(kernel))


def violations(kernel: str, facts: Facts, arch: Architecture) -> Iterator[str]:
    """What this kernel may not do on this architecture."""
    if facts.spills:
        yield f"spills {facts.spills} bytes of registers"
    if facts.stack:
        yield f"has a stack frame of {facts.stack} bytes"
    if facts.float_atomics:
        yield f"adds floats in an order that may change: {' '.join(sorted(facts.float_atomics))}"
    if not is_for_many_rows(kernel) and not kernel.startswith((*TOKEN_KERNELS, *LONG_ROW_KERNELS)):
        return
    if occupancy(facts, arch) < min_occupancy(kernel):
        yield (
            f"has an occupancy of {occupancy(facts, arch):.0%}, less than {min_occupancy(kernel):.0%} "
            f"({facts.registers} registers, {facts.shared} bytes of shared memory)"
        )
    if max(facts.loads, default=0) < 128:
        yield "has no 128-bit global loads"
    elif is_for_many_rows(kernel) and instructions_per_token(kernel, facts) is None:
        needed = wide_accesses_of_tile(kernel)
        yield f"makes {facts.wide_accesses} 128-bit accesses in its tile loop, where its values need {needed}"


# ---- the document ----

INTRODUCTION = """# Resources of the CUDA kernels

Written by `csrc/testing/cuda_check.py --write` and checked by `make cuda-check`; nothing here is measured on a device.
Compiled by nvcc release {version}.

Kernels are named as in `csrc/cuda/`. `scan_rows<Op, 1>` gives a warp to a row, `scan_rows<Op, 8>` a block of 8 warps,
`scan_long_rows` many blocks. All blocks have 256 threads.

## Registers and occupancy

Registers of a thread / share of the warps of an SM that can be resident, from registers, shared memory and the limits
of the architecture. {frames}
"""

ACCESSES = """
## Widths of global loads and stores

In bits, as they occur in the machine code. Values, targets and outputs move by 128-bit accesses, 8 mask bytes by one of
64 (4 beside float64: 32); narrow ones are for the ends of rows and for rows that are not aligned alike.
"""

INSTRUCTIONS = """
## Instructions per token

Of the kernels for many rows: the instructions on the shortest path once around the tile loop that makes all of its
128-bit accesses, divided by the tokens of a thread. A lower bound: a path may skip what only some tokens need, and a
called function counts as one instruction.
"""


def markdown_table(header: list[str], rows: list[list[str]]) -> str:
    """A table of Markdown with its columns aligned."""
    widths = [max(map(len, column)) for column in zip(header, *rows, strict=True)]
    lines = [header, ["-" * width for width in widths], *rows]
    return "".join(
        "| " + " | ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)) + " |\n"
        for line in lines
    )


def access_rows(kernel: str, by_arch: dict[str, Facts]) -> Iterator[list[str]]:
    """One row for each set of architectures on which a kernel has the same widths."""

    def widths(bits: set[int]) -> str:
        return " ".join(map(str, sorted(bits, reverse=True))) or "-"

    groups: dict[tuple[str, str], list[str]] = {}
    for arch, facts in by_arch.items():
        groups.setdefault((widths(facts.loads), widths(facts.stores)), []).append(arch)
    for (loads, stores), names in groups.items():
        yield [f"`{kernel}`", "all" if len(groups) == 1 else " ".join(names), loads, stores]


def document(table: Table, architectures: list[Architecture], version: str) -> str:
    """The text of docs/cuda_resources.md."""
    names = [arch.name for arch in architectures]
    resources: list[list[str]] = []
    accesses: list[list[str]] = []
    instructions: list[list[str]] = []
    for kernel, by_arch in table.items():
        cells = [
            f"{by_arch[arch.name].registers} / {occupancy(by_arch[arch.name], arch):.0%}" for arch in architectures
        ]
        shared = sorted({facts.shared for facts in by_arch.values()})
        resources.append([f"`{kernel}`", *cells, " or ".join(map(str, shared))])
        accesses += access_rows(kernel, by_arch)
        if is_for_many_rows(kernel):
            counts = [instructions_per_token(kernel, by_arch[name]) for name in names]
            instructions.append([f"`{kernel}`", *("-" if count is None else f"{count:.1f}" for count in counts)])
    framed = [kernel for kernel, by_arch in table.items() if any(f.spills or f.stack for f in by_arch.values())]
    frames = "No kernel spills or has a stack frame on any of them."
    if framed:
        frames = "Spills or stack frames: " + ", ".join(f"`{kernel}`" for kernel in framed) + "."
    return (
        INTRODUCTION.format(version=version, frames=frames)
        + "\n"
        + markdown_table(["kernel", *names, "static shared memory, bytes"], resources)
        + ACCESSES
        + "\n"
        + markdown_table(["kernel", "architectures", "loads", "stores"], accesses)
        + INSTRUCTIONS
        + "\n"
        + markdown_table(["kernel", *names], instructions)
    )


def is_stale(text: str, version: str) -> bool:
    """Whether docs/cuda_resources.md differs from text, if this is the nvcc that it was written with."""
    written = DOCUMENT.read_text() if DOCUMENT.exists() else ""
    by = re.search(r"nvcc release (\S+, V\S+)\.\n", written)
    if by and by[1] != version:
        print(f"cuda-check: {DOCUMENT.relative_to(ROOT)} is of nvcc {by[1]}, this is {version}: not compared.")
        return False
    return written != text


# ---- the command ----


def parse_arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--check", action="store_true", help="fail if docs/cuda_resources.md is stale")
    parser.add_argument("--write", action="store_true", help="update docs/cuda_resources.md")
    parser.add_argument("--allow-missing", action="store_true", help="succeed with one line where a tool is missing")
    parser.add_argument("--jobs", type=int, default=len(os.sched_getaffinity(0)), help="compilers at a time")
    parser.add_argument("--arch", action="append", metavar="sm_XX", help="only this architecture; may be repeated")
    parser.add_argument("--source", action="append", metavar="NAME", help="only csrc/cuda/NAME.cu; may be repeated")
    arguments = parser.parse_args()
    if (arguments.arch or arguments.source) and (arguments.check or arguments.write):
        parser.error("--check and --write are about all architectures and sources: leave out --arch and --source")
    return arguments


def chosen_architectures(tools: Tools, asked: list[str] | None) -> list[Architecture]:
    """The architectures to compile for; says which ones this nvcc cannot."""
    unknown = [arch.name for arch in ARCHITECTURES if arch.name not in tools.known]
    if unknown:
        print(f"cuda-check: skipped, as nvcc {tools.version} does not know them: {' '.join(unknown)}")
    chosen = [arch for arch in ARCHITECTURES if arch.name in tools.known and (not asked or arch.name in asked)]
    if not chosen:
        raise CheckError(
            f"cuda-check knows {' '.join(arch.name for arch in ARCHITECTURES)}, not {' '.join(asked or [])}."
        )
    return chosen


def check(arguments: argparse.Namespace) -> int:
    """Do what the command line asks; returns the exit status."""
    tools = Tools.find()
    architectures = chosen_architectures(tools, arguments.arch)
    sources = sorted((ROOT / "csrc" / "cuda").glob("*.cu"))
    sources = [source for source in sources if not arguments.source or source.stem in arguments.source]
    if not sources:
        raise CheckError(f"cuda-check: there is no csrc/cuda/{arguments.source[0]}.cu.")
    started = time.monotonic()
    table = compile_all(tools, sources, architectures, arguments.jobs)
    found = [
        f"{arch.name}: {kernel} {violation}"
        for kernel, by_arch in table.items()
        for arch in architectures
        for violation in violations(kernel, by_arch[arch.name], arch)
    ]
    text = document(table, architectures, tools.version)
    if arguments.write:
        DOCUMENT.write_text(text)
    elif arguments.check and is_stale(text, tools.version):
        name = Path(sys.argv[0]).name
        found.append(f"{DOCUMENT.relative_to(ROOT)} is stale: run csrc/testing/{name} --write and commit it")
    elif not arguments.check:
        print(text)
    print(*found, sep="\n", end="\n" if found else "")
    print(
        f"cuda-check: {len(table)} kernels, {len(architectures)} architectures, nvcc {tools.version}, "
        f"{time.monotonic() - started:.0f} s: {len(found) or 'no'} violation{'s' * (len(found) != 1)}"
    )
    return 1 if found else 0


def main() -> int:
    """Run the check and turn what stops it into one message."""
    arguments = parse_arguments()
    try:
        return check(arguments)
    except MissingToolError as error:
        print(error)
        return 0 if arguments.allow_missing else 1
    except CheckError as error:
        print(error)
        return 1


if __name__ == "__main__":
    sys.exit(main())
