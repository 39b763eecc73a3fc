"""Stands in for W&B's module and server, so that a test can see what they are told."""

from pathlib import Path
from types import SimpleNamespace


class FakeRun:
    """Remembers what it is told; its summary lives on the server."""

    def __init__(self, server, options):
        self.server, self.options, self.url = server, options, "https://example.org/run"
        self.logged, self.config, self.artifacts, self.exit_code = [], {}, [], None
        self.dir = f"{options['dir']}/wandb/offline-run-20260101_000000-{options['id']}/files"
        Path(self.dir).mkdir(parents=True, exist_ok=True)
        self.summary = server.summaries.get(options["id"], {}) if options["resume"] else {}
        server.summaries[options["id"]] = self.summary

    def define_metric(self, name, **options):
        self.server.call("define_metric")

    def log(self, values):
        self.server.call("log")
        self.logged.append(values)
        kept = ("learn/part", "distill/epoch")
        self.summary.update({k: v for k, v in values.items() if k in kept})

    def log_artifact(self, artifact):
        self.server.call("log_artifact")
        self.artifacts.append(artifact)

    def finish(self, exit_code):
        self.exit_code = exit_code
        self.server.call("finish")

    def points(self, key):
        return [values[key] for values in self.logged if key in values]


class FakeWandb:
    """Stands in for the module and its server; what is named in `fails` raises."""

    def __init__(self, *fails, account=True):
        self.fails, self.account, self.runs, self.summaries = set(fails), account, [], {}
        self.Settings = SimpleNamespace

    def call(self, name):
        if name in self.fails:
            raise RuntimeError(f"{name} failed\nfor some reason")

    def setup(self, settings):
        self.call("setup")

    def login(self, prompt, verify):
        assert not prompt  # a run must never wait for someone to type
        return self.account

    def init(self, **options):
        self.call("init")
        self.runs.append(FakeRun(self, options))
        return self.runs[-1]

    def teardown(self, exit_code):
        self.call("teardown")

    def Table(self, columns, data):  # noqa: N802
        self.call("Table")
        return {"columns": columns, "data": data}

    def Image(self, image):  # noqa: N802
        return image.size

    def Artifact(self, name, type):  # noqa: A002, N802
        return SimpleNamespace(name=name, type=type, add_file=lambda path: self.call("add_file"))
