"""A federation's certificates: until when they hold, and new ones by the same authority.

NVFlare's provisioning gives a machine's certificate 360 days, which it lets nobody change, and the
root as many as it is told. New ones are made as the first were, from `project.yml` and the
authority's key; old and new are valid side by side until the old end, so that machines change one
by one.
"""

from __future__ import annotations

import json
import shutil
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path

from cryptography import x509
from cryptography.x509.oid import NameOID

from fedmllm.errors import UserError
from fedmllm.sites.flare.kits import AUTHORITY, PROJECT, kit_name, provision

SOON = timedelta(days=30)
_ROOT = ("root_cert", "root_pri_key")  # of what provisioning keeps (cert.json)
_OWN = ("server.crt", "client.crt")


@dataclass(frozen=True)
class Certificate:
    """name: of the machine or person, as provisioned. ends: the last moment at which it holds."""

    name: str
    ends: datetime


def certificate(kit: Path) -> Certificate:
    """The certificate of a kit, or, if that ends earlier, its authority's end. Raises `UserError`
    if there is none."""
    startup = kit / "startup"
    file = next((startup / name for name in _OWN if (startup / name).is_file()), None)
    if file is None:
        raise UserError(f"{kit} has no certificate: it lacks {' or '.join(_OWN)} in startup/")
    own, root = _read(file), _read(startup / "rootCA.pem")
    name = own.subject.get_attributes_for_oid(NameOID.COMMON_NAME)[0].value
    return Certificate(str(name), min(own.not_valid_after_utc, root.not_valid_after_utc))


def _read(file: Path) -> x509.Certificate:
    try:
        return x509.load_pem_x509_certificate(file.read_bytes())
    except (OSError, ValueError) as error:
        raise UserError(f"certificate {file} cannot be read: {error}") from error


def renew(folder: Path) -> Path:
    """New keys and certificates for all kits of a federation; returns the folder with a startup/ a
    kit, to put in the place of the old one.

    Raises `UserError` if the folder lacks the authority, or has new ones of this day.
    """
    project, state = folder / "project.yml", folder / AUTHORITY / "cert.json"
    try:
        kept = json.loads(state.read_text())
        root = {key: kept[key] for key in _ROOT}
    except (OSError, ValueError, KeyError) as error:
        raise UserError(
            f"{folder} is not the folder that deploy init made, with project.yml and "
            f"{AUTHORITY}/cert.json: bring {AUTHORITY}/ back to where it was"
        ) from error
    out = folder / f"renewed-{datetime.now(UTC):%Y-%m-%d}"
    if out.exists():
        raise UserError(f"{out} exists: certificates were renewed today; remove it to do so again")
    draft = folder / ".renewed.draft"
    shutil.rmtree(draft, ignore_errors=True)
    (draft / PROJECT / "state").mkdir(parents=True)
    try:
        (draft / PROJECT / "state" / "cert.json").write_text(json.dumps(root))
        (draft / "new").mkdir(mode=0o700)
        for made in sorted(provision(project, draft).iterdir()):
            kit = draft / "new" / kit_name(made.name, project)
            kit.mkdir()
            (made / "startup").rename(kit / "startup")
        (draft / "new").rename(out)
    finally:
        shutil.rmtree(draft, ignore_errors=True)
    return out
