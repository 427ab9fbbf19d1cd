"""Tenants as the calls of the registry name and show them. All functions run on the archive's thread."""

from collections import defaultdict

from updraft.registry.v1 import registry_pb2 as pb
from updraft_chassis import rpc
from updraft_chassis.tenants import hashes
from updraft_registry.storage.archive import Archive

_SET_BACK_MS = 24 * 60 * 60 * 1000

_PAGE_BYTES = rpc.MAX_MESSAGE_BYTES // 2
"""Maximum size of the tenants in a page."""


def asked(archive: Archive, speculator: str, request: pb.ForgetTenantRequest | pb.ListTenantsRequest) -> int:
    """The hash of the tenant that a request is about; 0 if it names none.

    InvalidInput for an unusable name, Exhausted or Conflict if there is no salt to hash it with.
    """
    if request.WhichOneof("tenant") != "name":
        return request.hash
    digest = hashes.digest(request.name)
    salt = archive.catalogue.tenants.record(speculator).salt
    if not salt:  # a new salt for any name of a speculator that somebody types would never be used
        archive.require(speculator)
        salt = archive.salt(speculator)
    return hashes.keyed(digest, salt)


def order_ms(now_ms: int, done_ms: int) -> int:
    """The time of an order that is given now: after all that the trainer has carried out, because times alone tell it whether
    an order is new, and clocks may be set back. A report far in the future is wrong, and moves nothing."""
    return max(now_ms, done_ms + 1) if done_ms <= now_ms + _SET_BACK_MS else now_ms


def known(archive: Archive, speculator: str, tenant: int, done_ms: int, *, after: int = 0) -> pb.ListTenantsResponse:
    """The tenant with this hash, or for 0 a page of all, with hashes above `after`.

    `done_ms`: up to when the trainer has carried out orders.
    """
    versions, incomplete = defaultdict[int, list[int]](list), []
    for number, provenance in archive.catalogue.provenance(speculator).items():
        for one in provenance.tenants:
            versions[one].append(number)
        if provenance.has_more_tenants:
            incomplete.append(number)
    forgotten = archive.catalogue.tenants.record(speculator).forgotten
    listed = [tenant] if tenant else sorted(one for one in versions.keys() | forgotten.keys() if one > after)
    answer, num_bytes = pb.ListTenantsResponse(incomplete_versions=incomplete), 0
    for one in listed:
        found = pb.Tenant(
            hash=one,
            versions=versions.get(one, ()),
            forgotten_unix_ms=forgotten.get(one, 0),
            is_deleted=0 < forgotten.get(one, 0) <= done_ms,
        )
        num_bytes += found.ByteSize()
        if answer.tenants and num_bytes > _PAGE_BYTES:
            answer.next_after = answer.tenants[-1].hash
            break
        answer.tenants.append(found)
    return answer
