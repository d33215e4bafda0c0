"""The doors: each hazard has one module through which it passes, and the others are searched for it (plain `ast`)."""

import ast
import itertools
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest

import mlsae

SRC = Path(mlsae.__path__[0])
MODULES = sorted(str(path.relative_to(SRC)) for path in SRC.rglob("*.py"))

ROOMS = [
    {"errors", "recipes", "costs", "gpus"},
    {"files", "config", "stopping", "intervals", "mesh"},
    {"unpickler"},
    {"untrusted", "resolving", "estimate", "flags"},
    {
        "textfiles",
        "tokens",
        "metrics",
        "frames",
        "ops",
        "ops.autograd",
        "ops.reference",
        "ops.cpu",
        "ops.gpu",
        "ops.imported",
        "ops.gpu_kernels",
        "analysis.events",
        "analysis.depth",
    },
    {"formats.weights", "manifest"},
    {"formats.foreign"},
    {
        "formats.own",
        "formats.checkpoint",
        "formats.lawson2024",
        "formats.saelens",
        "formats.sparsify",
        "formats.dictionary_learning",
        "formats.openai",
    },
    {"formats"},
    {"downloads", "card"},
    {"publish"},
    {"fingerprint"},
    {"text", "devices", "sae", "blocks"},
    {"data", "hub", "losses", "parallel", "initial", "optimizer", "checkpoint", "shards"},
    {"lm", "trainer"},
    {"reading", "reporting", "prepare"},
    {"stream", "lens", "heldout", "norms"},
    {"validation"},
    {
        "train",
        "evaluate",
        "analysis",
        "analysis.layers",
        "analysis.geometry",
        "analysis.directions",
        "analysis.vocabulary",
    },
    {"analysis.nulls", "analysis.summary", "analysis.example_file", "analysis.example_rows"},
    {"analysis.examples", "analysis.latents", "analysis.lawson2024_dists", "analysis.lawson2024_examples"},
    {"analysis.sums"},
    {"lockstep", "offlayer", "convert", "downstream"},
    {"downstream.saebench", "downstream.delphi", "downstream.neuronpedia"},
    {"analyze"},
    {"analysis.wording"},
    {"analysis.drawing"},
    {"analysis.picture"},
    {"analysis.heatmaps", "analysis.spread", "analysis.lives", "analysis.cosines", "analysis.curves"},
    {"analysis.figures"},
    {"analysis.report", "analysis.comparison"},
    {"sweep"},
    {"compare", "analysis.reproduction"},
    {"reproduce"},
    {"demo", "info", "plan"},
    {"explorer.kept"},
    {"explorer.answers"},
    {"explorer.exchange"},
    {"explorer.guard"},
    {"explorer.server"},
    {"explorer.statistics", "explorer.training", "explorer.notes"},
    {"explorer.table"},
    {"explorer.library"},
    {"explorer.heatmap", "explorer.overview", "explorer.latents", "explorer.inference"},
    {"explorer.prompts"},
    {"explorer.steering"},
    {"explorer.logits"},
    {"explorer.app"},
    {"explorer"},
    {"naming"},
    {"measuring"},
    {"commands"},
    {"cli"},
    {"__init__", "__main__"},
]
"""The house from its cellar up: a module imports modules of lower rooms, or of its own without a circle."""

BESIDE_THE_DOOR = {
    ("analysis/drawing.py", "figure.savefig"): "into a buffer in memory",
    ("analysis/example_file.py", "self._file.write_table"): "into what files.replacing opened",
    ("analysis/latents.py", "pq.write_table"): "into what files.replacing opened",
    ("analysis/lawson2024_dists.py", "pq.write_table"): "into what files.replacing opened",
    ("unpickler.py", "torch.load"): "in a process of its own, for untrusted.unpickled",
}
"""Calls that only look like writing, and why."""


@cache
def parsed(module: str) -> ast.Module:
    return ast.parse((SRC / module).read_text())


def name_of(node: ast.AST) -> str:
    """`os.path.join` of an expression of names and dots; "" of anything else."""
    if isinstance(node, ast.Name):
        return node.id
    if isinstance(node, ast.Attribute):
        return f"{name_of(node.value)}.{node.attr}"
    return ""


def calls(module: str) -> Iterator[tuple[ast.Call, str]]:
    for node in ast.walk(parsed(module)):
        if isinstance(node, ast.Call):
            yield node, name_of(node.func)


def places(module: str, nodes: list[ast.AST]) -> list[str]:
    """`module:line source` of each node, to read in a failure."""
    return [f"{module}:{getattr(node, 'lineno', 0)} {ast.unparse(node).splitlines()[0][:90]}" for node in nodes]


def imported(module: str, *, everywhere: bool = False) -> set[str]:
    """Modules that a module imports when it is imported itself, or anywhere in it; not those for type checkers."""

    def walk(body: list[ast.stmt]) -> Iterator[ast.stmt]:
        for node in body:
            if isinstance(node, ast.If) and name_of(node.test) in ("TYPE_CHECKING", "typing.TYPE_CHECKING"):
                continue
            yield node
            if everywhere or not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                for field in ("body", "orelse", "finalbody", "handlers"):
                    yield from walk(getattr(node, field, []))

    found = set()
    for node in walk(parsed(module).body):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            assert node.level == 0, f"{module}: relative import"
            found.add(node.module)
            found |= {f"{node.module}.{alias.name}" for alias in node.names}
    return found


# ---- files -----------------------------------------------------------------------------------------------------------

WRITES = ("write_text", "write_bytes", "save_file", "savez", "tofile", "to_parquet", "write_table", "savefig")
MODULES_THAT_WRITE = (
    "pickle",
    "tempfile",
    "shutil",
    "torch.save",
    "torch.load",
    "numpy.load",
    "joblib",
    "dill",
    "marshal",
)
MOVES = (
    "os.rename",
    "os.replace",
    "os.remove",
    "os.unlink",
    "os.makedirs",
    "os.mkdir",
    "torch.save",
    "torch.load",
    "np.load",
)


def writes(module: str) -> list[ast.AST]:
    """Calls that write, move or unpickle, and `open` and `memmap` with a mode to write."""
    found: list[ast.AST] = []
    for node, name in calls(module):
        last = name.rpartition(".")[2]
        position = 1 if name in ("open", "io.open", "gzip.open") else 0  # path.open(mode)
        modes = [k.value for k in node.keywords if k.arg == "mode"] or node.args[position : position + 1]
        mode = "".join(m.value for m in modes if isinstance(m, ast.Constant) and isinstance(m.value, str))
        opened = last == "open" and set(mode) & set("wax+")
        mapped = last == "memmap" and mode != "r"
        allowed = name.startswith("files.") or (module, name) in BESIDE_THE_DOOR
        if not allowed and (opened or mapped or name in MOVES or last in WRITES):
            found.append(node)
    return found


@pytest.mark.parametrize("module", [module for module in MODULES if module not in ("files.py", "untrusted.py")])
def test_only_files_writes(module: str):
    assert places(module, writes(module)) == []
    used = {
        name
        for name in imported(module, everywhere=True)
        for bad in MODULES_THAT_WRITE
        if f"{name}.".startswith(f"{bad}.")
    }
    assert used == set()


@pytest.mark.parametrize("module", [module for module in MODULES if module != "untrusted.py"])
def test_only_untrusted_parses_what_others_wrote(module: str):
    """JSON, YAML and safetensors go through checks of size, depth, keys and header; rows of text have their own file."""
    banned = {"yaml", "safetensors.safe_open", "safetensors.torch", "safetensors.torch.load_file"}
    assert imported(module, everywhere=True) & banned == set()
    loads = [node for node, name in calls(module) if name in ("json.load", "json.loads", "eval", "exec", "__import__")]
    if module != "textfiles.py":
        assert places(module, loads) == []


def test_pickles_are_read_in_one_place_by_torchs_restricted_unpickler():
    found = [(module, node) for module in MODULES for node, name in calls(module) if name.endswith("torch.load")]
    assert [(module, ast.unparse(node)) for module, node in found] == [
        ("unpickler.py", "torch.load(path, map_location='cpu', weights_only=True)")
    ]
    assert [module for module in MODULES if "mlsae.unpickler" in imported(module, everywhere=True)] == ["untrusted.py"]


# ---- errors ----------------------------------------------------------------------------------------------------------


def broad(handler: ast.ExceptHandler) -> bool:
    types = handler.type.elts if isinstance(handler.type, ast.Tuple) else [handler.type]
    return any(kind is None or name_of(kind) in ("Exception", "BaseException") for kind in types)


def leaves(handler: ast.ExceptHandler) -> bool:
    """Whether the handler ends by raising, on its way out, the same error or another."""
    return isinstance(handler.body[-1], ast.Raise)


SWALLOWS = {("cli.py", "main"), ("downloads.py", "_ask")}
"""cli: the outermost frame. downloads: a failure of the network is kept, and is a ModelError if the cache has nothing either."""


@pytest.mark.parametrize("module", MODULES)
def test_no_error_is_swallowed(module: str):
    found = []
    for function in ast.walk(parsed(module)):
        if isinstance(function, ast.FunctionDef):
            handlers = [node for node in ast.walk(function) if isinstance(node, ast.ExceptHandler)]
            swallowed = [handler for handler in handlers if broad(handler) and not leaves(handler)]
            if (module, function.name) not in SWALLOWS:
                found += places(module, [*swallowed])
    assert found == []


@pytest.mark.parametrize("module", MODULES)
def test_errors_suppressed_are_named(module: str):
    """`contextlib.suppress(Exception)` is a swallow by another name."""
    found = [
        node
        for node, name in calls(module)
        if name.endswith("suppress") and {name_of(arg) for arg in node.args} & {"Exception", "BaseException"}
    ]
    assert places(module, [*found]) == []


# ---- one reader ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("module", [module for module in MODULES if module != "lm.py"])
def test_only_lm_reads_the_residual_stream(module: str):
    """No `hidden_states` (post-norm at the last layer), no hooks, no block of a model called or replaced."""
    nodes = list(ast.walk(parsed(module)))
    names = [n for n in nodes if isinstance(n, ast.Attribute) and n.attr in ("hidden_states", "register_forward_hook")]
    names += [n for n in nodes if isinstance(n, ast.keyword) and n.arg == "output_hidden_states"]
    names += [
        n for n in nodes if isinstance(n, ast.Attribute) and n.attr in ("register_forward_pre_hook", "get_decoder")
    ]
    assert places(module, [*names]) == []


def test_lm_does_not_read_hidden_states_either():
    """Its own blocks take an argument of that name, which is all."""
    nodes = ast.walk(parsed("lm.py"))
    assert [n.lineno for n in nodes if isinstance(n, ast.keyword) and n.arg == "output_hidden_states"] == []
    assert [
        n.lineno for n in ast.walk(parsed("lm.py")) if isinstance(n, ast.Attribute) and n.attr == "hidden_states"
    ] == []


TOKENIZING = (
    "encode_plus",
    "batch_encode_plus",
    "apply_chat_template",
    "convert_tokens_to_ids",
    "convert_ids_to_tokens",
)


@pytest.mark.parametrize("module", [module for module in MODULES if module != "tokens.py"])
def test_only_tokens_calls_a_tokenizer(module: str):
    found = [
        node
        for node, name in calls(module)
        if name.rpartition(".")[2] in TOKENIZING
        or f".{name}".endswith((".tokenizer", ".tokenizer.hf", ".tokenizer.encode"))
    ]
    assert places(module, [*found]) == []


# ---- zero is a value -------------------------------------------------------------------------------------------------


def defaults(module: str) -> list[ast.AST]:
    """`x or default` whose value is used: an `or` that is not itself, or inside, a test or a boolean expression."""
    nodes = list(ast.walk(parsed(module)))
    parents = {child: node for node in nodes for child in ast.iter_child_nodes(node)}

    def tested(node: ast.AST) -> bool:
        parent = parents[node]
        if isinstance(parent, ast.BoolOp):
            return tested(parent)
        if isinstance(parent, ast.If | ast.While | ast.IfExp | ast.Assert):
            return parent.test is node
        if isinstance(parent, ast.comprehension):
            return node in parent.ifs
        return isinstance(parent, ast.UnaryOp) and isinstance(parent.op, ast.Not)

    def boolean(node: ast.AST) -> bool:
        """An expression that is True or False whatever it is made of."""
        if isinstance(node, ast.BoolOp):
            return boolean(node.values[0])
        if isinstance(node, ast.Call):
            return name_of(node.func) in ("isinstance", "any", "all", "bool") or name_of(node.func).endswith(
                (".exists", ".is_file", ".is_dir", ".any", ".startswith", ".endswith")
            )
        return isinstance(node, ast.Compare) or (isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.Not))

    def harmless(default: ast.AST) -> bool:
        """A text, an empty collection, 0: nothing that a 0 on the left would be mistaken for."""
        if isinstance(default, ast.Constant):
            return isinstance(default.value, str) or default.value == 0
        empty = isinstance(default, ast.List | ast.Tuple) and not default.elts
        return empty or isinstance(default, ast.JoinedStr) or (isinstance(default, ast.Dict) and not default.keys)

    ors = [n for n in nodes if isinstance(n, ast.BoolOp) and isinstance(n.op, ast.Or)]
    return [n for n in ors if not (tested(n) or boolean(n) or harmless(n.values[-1]))]


EXAMINED = {
    # Texts, paths and objects: only the empty one, or None, is false.
    "checkpoint.py": {"self.steps()", "error.strerror"},
    "commands.py": {"command.out"},
    "data.py": {"blocks.info.complete"},
    "files.py": {"os.environ.get('MLSAE_CACHE')", "cause.strerror"},
    "formats/__init__.py": {"one.layers"},
    "formats/lawson2024.py": {"one.layers", "tuple(range(depth))"},
    "formats/weights.py": {"config.layers", "one.layers"},
    "hub.py": {"limit"},  # a limit of 0 positions means that there is none
    "lm.py": {"name", "revision"},
    "text.py": {"config", "named", "size"},  # a dataset of 0 rows weighs as one of 1
    "textfiles.py": {"self._waiting"},
    "analysis/report.py": {"run.get('directory')", "published.get('layers')"},
    "explorer/steering.py": {"reconstruct"},  # true or false
    # Positive by validation, or None; or 0 is another spelling of None.
    "reading.py": {"lm.context_length"},
    "resolving.py": {"config.batch_size", "config.accumulation_steps", "norm_factor"},
    "stream.py": {"config.batch_size", "config.context_length"},
    "train.py": {
        *("config.batch_size", "config.accumulation_steps", "config.context_length"),
        *("self.config.log_every_steps", "self.config.validate_every_steps", "self.config.save_every_steps"),
    },
    "trainer.py": {"config", "step_tokens"},
    "validation.py": {"config.batch_size"},
    "untrusted.py": {"error.problem", "error.problem_mark", "sorted(map(str, found.keys() ^ shapes.keys()))"},
}
"""The left sides of `or` in each module that were looked at and take no 0 for nothing."""


@pytest.mark.parametrize("module", MODULES)
def test_zero_is_not_taken_for_nothing(module: str):
    """N4: layer 0, BOS id 0 and pad id 0 are values; `or` would read them as not given."""
    found = [node for node in defaults(module) if isinstance(node, ast.BoolOp)]
    unknown = [node for node in found if ast.unparse(node.values[0]) not in EXAMINED.get(module, set())]
    assert places(module, [*unknown]) == []


# ---- rooms -----------------------------------------------------------------------------------------------------------


def dotted(module: str) -> str:
    """`analysis/layers.py` as `analysis.layers`, `analysis/__init__.py` as `analysis`."""
    name = module.removesuffix(".py").replace("/", ".")
    return name if name == "__init__" else name.removesuffix(".__init__")


def own_imports(module: str) -> set[str]:
    """Our modules that a module imports when it is imported."""
    known = {dotted(m) for m in MODULES}
    return {name.removeprefix("mlsae.") for name in imported(module) if name.startswith("mlsae.")} & known


@pytest.mark.parametrize(
    "module",
    [
        "cli.py",
        "commands.py",
        "config.py",
        "errors.py",
        "files.py",
        "flags.py",
        "measuring.py",
        "naming.py",
        "recipes.py",
        "__init__.py",
        "__main__.py",
    ],
)
def test_light_modules_import_nothing_heavy(module: str):
    heavy = {"torch", "transformers", "datasets", "numpy", "matplotlib", "safetensors", "huggingface_hub", "pyarrow"}
    assert {name.partition(".")[0] for name in imported(module)} & heavy == set()


def test_every_module_has_a_room():
    assert {dotted(module) for module in MODULES} <= set().union(*ROOMS)
    assert sum(map(len, ROOMS)) == len(set().union(*ROOMS))


@pytest.mark.parametrize("module", MODULES)
def test_imports_point_down(module: str):
    room = {name: level for level, names in enumerate(ROOMS) for name in names}
    here = room[dotted(module)]
    assert {name for name in own_imports(module) if room[name] > here} == set()


def test_no_module_imports_itself_by_way_of_others():
    graph = {dotted(module): own_imports(module) - {dotted(module)} for module in MODULES}
    while leaf := [name for name, needs in graph.items() if not needs & graph.keys()]:
        graph = {name: needs for name, needs in graph.items() if name not in leaf}
    assert graph == {}


# ---- the lint itself -------------------------------------------------------------------------------------------------

PLANTED = [
    ("writes", "open(path, 'w')"),
    ("writes", "open(path, mode='ab')"),
    ("writes", "path.open('x')"),
    ("writes", "path.write_text('')"),
    ("writes", "os.replace(a, b)"),
    ("writes", "torch.save(x, path)"),
    ("writes", "np.memmap(path, mode='w+')"),
    ("defaults", "layer = layer or n_layers - 1"),
    ("defaults", "f(x or 3)"),
    ("defaults", "x = a or None"),
]
CLEAN = [
    ("writes", "open(path)"),
    ("writes", "open(path, 'rb')"),
    ("writes", "path.open()"),
    ("writes", "files.write_text(path, '')"),
    ("writes", "np.memmap(path, dtype='u2', mode='r')"),
    ("defaults", "if a or b: pass"),
    ("defaults", "x = a == 1 or b == 2"),
    ("defaults", "x = a or 0"),
]


@pytest.mark.parametrize(("rule", "code"), [*PLANTED, *CLEAN])
def test_the_lint_finds_what_is_planted(rule: str, code: str, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(globals(), "parsed", lambda module: ast.parse(code))
    assert bool(globals()[rule]("planted.py")) == ((rule, code) in PLANTED)


def test_the_lint_reads_every_file():
    assert {"cli.py", "lm.py", "files.py", "analysis/layers.py", "ops/reference.py"} <= set(MODULES)
    assert len(MODULES) == len(set(itertools.chain(MODULES)))
