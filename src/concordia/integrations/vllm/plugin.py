"""The entry point that vLLM calls in every process of an engine (group vllm.general_plugins).

Owns: making `ConcordiaConnector` a name that `--kv-transfer-config` knows. Promises: never raises,
imports neither torch nor a connector, and may be called again. Called by vLLM's plugin loader. Does
not switch anything on: an engine without the connector is not touched.
"""

from __future__ import annotations

import logging

NAME = "ConcordiaConnector"
MODULE = "concordia.integrations.vllm.connector"


def register() -> None:
    """Make the connector known to vLLM's factory."""
    try:
        from vllm.distributed.kv_transfer.kv_connector.factory import KVConnectorFactory

        KVConnectorFactory.register_connector(NAME, MODULE, NAME)
    except ValueError:
        return  # registered already: a plug-in may be loaded more than once per process
    except Exception as error:  # the guest door of this entry point: vLLM must start without us
        logging.getLogger("vllm.concordia").warning(
            "ConcordiaConnector is not registered by name (%s: %s); "
            "kv_connector_module_path=%s still works",
            type(error).__name__,
            error,
            MODULE,
        )
