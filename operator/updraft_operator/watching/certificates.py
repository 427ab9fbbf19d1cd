"""The operator's CA, and what it signs.

The CA is in a Secret of the operator's own namespace, which the chart makes empty, so that the operator needs no right to make
Secrets there and it goes with the release. One task reads it again every minute, and renews the CA. Reconciliations ask
only what is known. The Secrets of resources follow in their next reconciliation, which a change of the CAs brings about.
"""

import asyncio
import base64
import logging
from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress
from dataclasses import replace

from updraft_chassis.clock import Clock
from updraft_chassis.errors import InvalidInput, NotFound, Unavailable, UpdraftError
from updraft_operator.api import names
from updraft_operator.manifests.manifest import Manifest, OperatorConfig
from updraft_operator.manifests.redis_users import with_authorities
from updraft_operator.manifests.tls.objects import CA, CERT, KEY
from updraft_operator.manifests.tls.terms import (
    Certificate,
    CertificateOrder,
    OwnSecrets,
    TlsMode,
    is_due,
    needs_ca,
    overdue_s,
    signer,
    trusted,
)
from updraft_operator.planning.objects import Child
from updraft_operator.watching.cluster import Cluster
from updraft_operator.watching.x509 import Authority, new_authority, read_authorities, read_certificate, sign

logger = logging.getLogger(__name__)

CA_KEY = "ca.key"
_MAX_PERIOD_S = 60.0
_PERIODS_PER_CERTIFICATE = 10
_RETRY_S = 2.0
_MAX_CAS = 4
"""An expired CA stays in the Secret until so many are newer: a clock may be wrong, and then it is needed."""


class Certificates:
    """`may_write` is whether this process leads; `on_change` is called when other CAs are trusted than before."""

    def __init__(
        self,
        cluster: Cluster,
        config: OperatorConfig,
        own: OwnSecrets,
        clock: Clock,
        *,
        may_write: Callable[[], bool],
        on_change: Callable[[], None],
    ) -> None:
        self._cluster = cluster
        self._tls = config.tls
        self._own = own
        self._clock = clock
        self._may_write = may_write
        self._on_change = on_change
        self.redis_overdue_s = float("inf")
        """The Unix time at which the certificate of the chart's Redis is overdue."""
        self._authorities: tuple[Authority, ...] = ()
        """Those that are trusted, newest first."""
        self._redis_authorities = ""
        self._asked = asyncio.Event()
        self._is_closed = False
        self._last_problem = ""

    @property
    def authorities(self) -> str:
        """The CAs that clients trust, in PEM format; empty if the operator does not sign, or does not know them yet."""
        return "".join(authority.certificate for authority in self._authorities)

    @property
    def redis_authorities(self) -> str:
        """The CAs of the chart's Redis, in PEM format; empty if they are not known."""
        return self.authorities if self._tls.mode is TlsMode.SELF_SIGNED else self._redis_authorities

    def redis_url(self, url: str) -> str:
        """The address of the operator's Redis for the operator itself, which has the CAs in memory where pods have a file.

        Unavailable until they are known.
        """
        if self._own.redis is None:
            return url
        if not self.redis_authorities:
            raise Unavailable("the CA of the operator's Redis is not known yet")
        return with_authorities(url, self.redis_authorities)

    def trusted(self, config: OperatorConfig, held: Mapping[str, Certificate], last: Child | None) -> OperatorConfig:
        """The settings with the CAs that the clients of a resource's servers trust, which have these certificates, by part.

        Until the registry's are known, those in `last`, the ConfigMap: it must not vanish because an operator starts.
        """
        known = self.authorities
        if config.tls.mode is TlsMode.CERT_MANAGER:
            known = _of_all(held) if names.REGISTRY in held else ""
        if not known and last is not None and config.tls.is_on:
            known = str((last.live().get("data") or {}).get(CA, ""))
        return replace(
            config,
            tls=replace(config.tls, authorities=known, can_sign=bool(self._authorities), problem=self._last_problem),
        )

    def sign(self, order: CertificateOrder) -> dict[str, str]:
        """The data of the order's Secret. Only with `authorities`."""
        now_s, known = self._clock.now(), self._trusted(self._authorities) or self._authorities
        signing = signer([authority.facts for authority in known], now_s)
        authority = next(each for each in known if each.facts == signing)
        certificate, key = sign(authority, order.name, self._tls.lives.certificate_s, now_s)
        logger.info("Signed a certificate", extra={"secret": order.secret, "dns_name": order.name})
        return {CERT: certificate, KEY: key, CA: self.authorities}

    def start_over(self) -> None:
        """Forget the CAs, because another replica may have renewed them, and read them at once."""
        self._authorities = ()
        self._asked.set()

    def close(self) -> None:
        """End `run` after what it does now."""
        self._is_closed = True
        self._asked.set()

    async def run(self) -> None:
        """Until `close`."""
        period_s = min(_MAX_PERIOD_S, self._tls.lives.certificate_s / _PERIODS_PER_CERTIFICATE)
        while not self._is_closed:
            self._asked.clear()
            is_done = await self.is_refreshed()
            with suppress(TimeoutError):
                async with asyncio.timeout(period_s if is_done else min(_RETRY_S, period_s)):
                    await self._asked.wait()

    async def refresh(self) -> None:
        """Read the CA, renew it if it is time, and keep the certificate of the chart's Redis valid. Raises UpdraftErrors.

        A dry run, or a replica that does not lead, only reads.
        """
        before = self.authorities
        if not self._may_write():
            await self.read()
        else:
            if self._tls.mode is TlsMode.SELF_SIGNED:
                await self._refresh_authorities()
            await self._refresh_redis()
        if self.authorities != before:
            self._on_change()

    async def read(self) -> None:
        """Read the CA without writing anything."""
        if self._tls.mode is TlsMode.SELF_SIGNED:
            self._authorities = self._trusted((await self._read_authorities())[1])

    async def is_refreshed(self) -> bool:
        """Whether `refresh` succeeded; the problem is logged otherwise, and told in the status of resources."""
        try:
            await self.refresh()
        except UpdraftError as error:
            problem = str(error)
        else:
            problem = ""
        if problem and problem != self._last_problem:
            logger.warning("Cannot renew certificates; will retry", extra={"reason": problem})
        self._last_problem = problem
        return not problem

    async def _refresh_authorities(self) -> None:
        version, known = await self._read_authorities()
        now_s = self._clock.now()
        if needs_ca([authority.facts for authority in known], now_s):
            known = (new_authority(self._tls.lives.ca_s, now_s), *known)[:_MAX_CAS]
            data = {CA: "".join(each.certificate for each in known), CA_KEY: "".join(each.key for each in known)}
            await self._write(self._own.authority, data, version)
            logger.info("Made a CA", extra={"secret": self._own.authority})
        self._authorities = self._trusted(known)

    def _trusted(self, known: Iterable[Authority]) -> tuple[Authority, ...]:
        by_id = {authority.facts.key_id: authority for authority in known}
        valid = trusted([authority.facts for authority in by_id.values()], self._clock.now())
        return tuple(by_id[facts.key_id] for facts in valid)

    async def _read_authorities(self) -> tuple[str, tuple[Authority, ...]]:
        """The version of the Secret, empty without one, and the CAs in it, the latest first.

        InvalidInput if it has something else: it may be somebody's.
        """
        version, data = await self._get(self._own.authority)
        if not data:
            return version, ()
        try:
            held = read_authorities(data.get(CA, ""), data.get(CA_KEY, ""))
        except ValueError as error:
            where = f"Secret {self._own.namespace}/{self._own.authority}"
            raise InvalidInput(
                f"{where} has no CA of this operator ({error}); remove its data to get a new CA"
            ) from error
        return version, held

    async def _refresh_redis(self) -> None:
        order = self._own.redis
        if order is None or not self._tls.is_on:
            return
        version, data = await self._get(order.secret)
        certificate = read_certificate(data.get(CERT, ""), data.get(KEY, ""), data.get(CA, ""))
        self._redis_authorities = data.get(CA, "")
        self.redis_overdue_s = overdue_s(certificate)
        if not self._authorities:  # none of this operator, or forgotten while the Secret was read
            return
        if is_due(certificate, order.name, self.authorities, self._clock.now()):
            await self._write(order.secret, self.sign(order), version)

    async def _get(self, name: str) -> tuple[str, dict[str, str]]:
        """Resource version and content of an own Secret; empty without one."""
        try:
            secret = await self._cluster.get("Secret", self._own.namespace, name)
        except NotFound:
            return "", {}
        data = secret.get("data") or {}
        decoded = {entry: base64.b64decode(value).decode(errors="replace") for entry, value in data.items()}
        return secret["metadata"]["resourceVersion"], decoded

    async def _write(self, name: str, data: dict[str, str], version: str) -> None:
        """Conflict or Unavailable if somebody else wrote it since it was read. Its labels and type are the chart's."""
        metadata = {"name": name, "namespace": self._own.namespace, **({"resourceVersion": version} if version else {})}
        content: Manifest = {"apiVersion": "v1", "kind": "Secret", "metadata": metadata, "stringData": data}
        await (self._cluster.apply(content) if version else self._cluster.create(content))


def _of_all(held: Mapping[str, Certificate]) -> str:
    """The CAs of all of them, each once: cert-manager renews certificates one by one, perhaps from another CA than before."""
    each = (certificate.authorities.strip() for certificate in held.values())
    return "".join(f"{authorities}\n" for authorities in dict.fromkeys(each) if authorities)
