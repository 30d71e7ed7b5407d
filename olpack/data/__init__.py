"""The data room: chats from files, and rows as the model sees them, with the tokens that are learned marked."""

from olpack.data.chats import load_chats, split
from olpack.data.hub import HubSet
from olpack.data.load import load_rows
from olpack.data.render import Renderer
from olpack.data.rows import Chat, TokenRow, request_of
from olpack.data.sources import Source

__all__ = ["Chat", "HubSet", "Renderer", "Source", "TokenRow", "load_chats", "load_rows", "request_of", "split"]
