"""Folders for a Flower federation: the app to run, and a kit without certificates for each party.

    DIR/app/           what `flwr run` sends: two files that import ours
    DIR/kits/server/   settings and experiment, as in a kit of NVFlare's (`flare/kits.py`)
    DIR/kits/SITE/     the same for a site

Keys, TLS and who may join are Flower's business.
"""

from __future__ import annotations

import shutil
from pathlib import Path

from fedmllm.errors import UserError
from fedmllm.sites.flare.kits import (
    KITS,
    SERVER,
    Plan,
    check_plan,
    plain_kit,
    server_facts,
    site_facts,
)

_PROJECT = """\
[project]
name = "fedmllm-federation"
version = "1.0.0"
description = "{name}: federated fine-tuning with FedMLLM"
license = "Apache-2.0"
dependencies = []

[tool.flwr.app]
publisher = "fedmllm"

[tool.flwr.app.components]
serverapp = "fedmllm_federation.server_app:app"
clientapp = "fedmllm_federation.client_app:app"

[tool.flwr.app.config]
kit = "{kit}"
experiment = "{name}"
"""
_MODULE = '''"""The {which} of FedMLLM."""

from fedmllm.sites.flower.{which} import app

__all__ = ["app"]
'''


def make_app(plan: Plan, out: Path) -> Path:
    """Write app and kits. Raises `UserError` for wrong names and if `out` exists."""
    check_plan(plan, out)
    out = out.resolve()
    if any(c in str(out) for c in '"\\\n'):
        raise UserError(f"{out} cannot be written into a Flower app: choose a plainer path")
    draft = out.with_name(f".{out.name}.draft")
    shutil.rmtree(draft, ignore_errors=True)
    package = draft / "app" / "fedmllm_federation"
    package.mkdir(parents=True)
    (draft / "app" / "pyproject.toml").write_text(
        _PROJECT.format(name=plan.config.name, kit=out / KITS / SERVER)
    )
    (package / "__init__.py").write_text('"""A Flower app."""\n')
    for which in ("server", "client"):
        (package / f"{which}_app.py").write_text(_MODULE.format(which=which))
    plain_kit(draft / KITS / SERVER, plan.config, server_facts(plan), site=False)
    for site in plan.sites:
        plain_kit(draft / KITS / site, plan.config, site_facts(plan, site), site=True)
    draft.rename(out)
    return out
