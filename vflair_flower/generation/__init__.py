"""Write texts with a model cut between parties: in jobs, and in a terminal (`vflair generate`, `vflair chat`)."""

from vflair_flower.generation.adapters import Adapter
from vflair_flower.generation.serving import ModelServer, ServeSettings
from vflair_flower.generation.talking import Answer, Conversation, open_conversation
from vflair_flower.generation.tickets import Ticket
from vflair_flower.generation.writing import Written, write_texts

__all__ = [
    "Adapter",
    "Answer",
    "Conversation",
    "ModelServer",
    "ServeSettings",
    "Ticket",
    "Written",
    "open_conversation",
    "write_texts",
]
