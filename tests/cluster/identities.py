"""Who is who in a cluster: one authority, the certificates it issued, tokens, and a kubeconfig for each user."""

import base64
import secrets
from collections.abc import Iterable
from pathlib import Path

import trustme
import yaml

NODE = "node-1"

# Group memberships by user. Kubernetes itself binds roles to the system: names; CoreDNS is given one.
USERS = {
    "admin": "system:masters",
    "system:kube-controller-manager": "",
    "system:kube-scheduler": "",
    "system:kube-proxy": "",
    "coredns": "",
    f"system:node:{NODE}": "system:nodes",
}


def write(folder: Path, *, server: str, hosts: Iterable[str]) -> None:
    """Write into `folder` what the API server needs, and `<user>.kubeconfig` for `server` for every one of USERS.

    `hosts` are the names and addresses by which the API server is reached.
    """
    folder.mkdir(parents=True, exist_ok=True)
    authority = trustme.CA(organization_name="Updraft test cluster")
    authority.cert_pem.write_to_path(str(folder / "ca.crt"))
    authority.private_key_pem.write_to_path(str(folder / "ca.key"))
    authority.issue_cert(*hosts).private_key_and_cert_chain_pem.write_to_path(str(folder / "apiserver.pem"))
    # The kubelet lets in whom the API server's certificate names; masters may do everything there.
    to_kubelet = authority.issue_cert("apiserver", common_name="kube-apiserver", organization_name="system:masters")
    to_kubelet.private_key_and_cert_chain_pem.write_to_path(str(folder / "kubelet-client.pem"))
    service_accounts = authority.issue_cert("service-accounts")
    service_accounts.private_key_pem.write_to_path(str(folder / "service-accounts.key"))
    tokens = {user: secrets.token_hex(16) for user in USERS}
    lines = [f'{tokens[user]},{user},{user},"{groups}"\n' for user, groups in USERS.items()]
    (folder / "tokens.csv").write_text("".join(lines))
    for user, token in tokens.items():
        write_kubeconfig(kubeconfig(folder, user), server=server, authority=authority.cert_pem.bytes(), token=token)


def kubeconfig(folder: Path, user: str) -> Path:
    """Where `write` put the user's kubeconfig."""
    return folder / f"{user.replace(':', '-')}.kubeconfig"


def write_kubeconfig(path: Path, *, server: str, authority: bytes, token: str) -> None:
    """Write a kubeconfig that needs no other file."""
    content = {
        "apiVersion": "v1",
        "kind": "Config",
        "clusters": [
            {
                "name": "updraft",
                "cluster": {
                    "server": server,
                    "certificate-authority-data": base64.b64encode(authority).decode(),
                },
            }
        ],
        "users": [{"name": "user", "user": {"token": token}}],
        "contexts": [{"name": "updraft", "context": {"cluster": "updraft", "user": "user"}}],
        "current-context": "updraft",
    }
    path.touch(mode=0o600)
    path.write_text(yaml.safe_dump(content, sort_keys=False))
