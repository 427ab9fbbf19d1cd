"""A real gRPC server in the test's own loop, with only the methods that the test cares for."""

from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import Any

import grpc
import grpc.aio
from google.protobuf.descriptor import ServiceDescriptor
from google.protobuf.message_factory import GetMessageClass

from updraft_chassis import rpc
from updraft_chassis.access import Access
from updraft_chassis.credentials import ServerTls


def service(descriptor: ServiceDescriptor, **methods: Callable[..., Any]) -> grpc.GenericRpcHandler:
    """Return handlers for some methods of a service: `service(pb.DESCRIPTOR.services_by_name["Registry"], Get=get)`."""
    handlers = {}
    for name, behaviour in methods.items():
        method = descriptor.methods_by_name[name]
        asked = "stream" if method.client_streaming else "unary"
        answered = "stream" if method.server_streaming else "unary"
        handlers[name] = getattr(grpc, f"{asked}_{answered}_rpc_method_handler")(
            behaviour,
            request_deserializer=GetMessageClass(method.input_type).FromString,
            response_serializer=GetMessageClass(method.output_type).SerializeToString,
        )
    return grpc.method_handlers_generic_handler(descriptor.full_name, handlers)


@asynccontextmanager
async def serving(*services: grpc.GenericRpcHandler) -> AsyncIterator[grpc.aio.Channel]:
    """Serve them on a free port with the chassis' server; yield a channel of the chassis' kind."""
    async with listening(*services) as address, rpc.channel(address) as channel:
        yield channel


@asynccontextmanager
async def listening(
    *services: grpc.GenericRpcHandler, access: Access | None = None, tls: ServerTls | None = None
) -> AsyncIterator[str]:
    """Serve them on a free port with the chassis' server; yield its address."""
    server = rpc.server(access)
    server.add_generic_rpc_handlers(services)
    port = rpc.bind(server, host="127.0.0.1", port=0, setting="none", tls=tls)
    await server.start()
    try:
        yield f"127.0.0.1:{port}"
    finally:
        await server.stop(grace=None)
