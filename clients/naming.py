"""Who a node is: its role and its name, from its node configuration or, simulated, from its partition.

| `node_config`                      | role        | name                      |
|------------------------------------|-------------|---------------------------|
| ``party="acme"``                   | data party  | acme                      |
| ``role="model party"``             | model party | model-party               |
| ``partition-id=2`` (simulation)    | data party  | party-2                   |
| nothing                            | data party  | node-<Flower's node id>   |
"""

from flwr.app import Context

from vflair_flower.control import DATA_PARTY_ROLE, MODEL_PARTY_ROLE
from vflair_flower.errors import ConfigurationError
from vflair_flower.remote import MODEL_PARTY


def role_of(context: Context) -> str:
    """Return a node's role; raise ConfigurationError if its configuration names an unknown one.

    In a simulation whose run configuration says ``model-party="node"``, the last partition is the model party.
    """
    role = str(context.node_config.get("role", ""))
    if role:
        if role not in (DATA_PARTY_ROLE, MODEL_PARTY_ROLE):
            raise ConfigurationError(
                f"this node's configuration says role={role!r}; known are {DATA_PARTY_ROLE!r} and {MODEL_PARTY_ROLE!r}."
            )
        return role
    if context.run_config.get("model-party") == "node" and "partition-id" in context.node_config:
        last = int(context.node_config["num-partitions"]) - 1
        return MODEL_PARTY_ROLE if int(context.node_config["partition-id"]) == last else DATA_PARTY_ROLE
    return DATA_PARTY_ROLE


def party_name(context: Context) -> str:
    """Return a node's name in the job."""
    if role_of(context) == MODEL_PARTY_ROLE:
        return MODEL_PARTY
    config = context.node_config
    if "party" in config:
        return str(config["party"])
    if "partition-id" in config:
        return f"party-{config['partition-id']}"
    return f"node-{context.node_id}"
