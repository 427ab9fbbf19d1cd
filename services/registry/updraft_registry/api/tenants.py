"""Tenants as the calls of the registry name and show them. All functions run on the archive's thread."""

from collections import defaultdict

from updraft.registry.v1 import registry_pb2 as pb
from updraft_chassis.errors import InvalidInput
from updraft_chassis.tenants import hashes
from updraft_registry.storage.archive import Archive

MAX_NAME_CHARS = 256


def asked(archive: Archive, speculator: str, request: pb.ForgetTenantRequest | pb.ListTenantsRequest) -> int:
    """The hash of the tenant that a request is about; 0 if it names none. InvalidInput for an unusable name."""
    if request.WhichOneof("tenant") != "name":
        return request.hash
    name = request.name.strip()
    if not 0 < len(name) <= MAX_NAME_CHARS or not name.isprintable():
        raise InvalidInput(f"the name of a tenant is 1 to {MAX_NAME_CHARS} printable characters")
    salt = archive.catalogue.tenants.record(speculator).salt
    if not salt:  # a new salt for any name that somebody types would never be used
        archive.require(speculator)
        salt = archive.catalogue.tenants.salt(speculator)
    return hashes.keyed(hashes.digest(name), salt)


def known(archive: Archive, speculator: str, tenant: int, done_ms: int) -> pb.ListTenantsResponse:
    """The tenant with this hash, or all for 0. `done_ms`: up to when the trainer has carried out orders."""
    versions, incomplete = defaultdict[int, list[int]](list), []
    for number, provenance in archive.catalogue.provenance(speculator).items():
        for one in provenance.tenants:
            versions[one].append(number)
        if provenance.has_more_tenants:
            incomplete.append(number)
    forgotten = archive.catalogue.tenants.record(speculator).forgotten
    listed = [tenant] if tenant else sorted(versions.keys() | forgotten.keys())
    return pb.ListTenantsResponse(
        tenants=[
            pb.Tenant(
                hash=one,
                versions=versions.get(one, ()),
                forgotten_unix_ms=forgotten.get(one, 0),
                is_deleted=0 < forgotten.get(one, 0) <= done_ms,
            )
            for one in listed
        ],
        incomplete_versions=incomplete,
    )
