"""Training data: chats from files, and rows of tokens as the model sees them, with their loss masks."""

from olpack.data.chats import load_chats, split
from olpack.data.hub import HubSet
from olpack.data.load import load_split, render_rows
from olpack.data.render import Renderer
from olpack.data.rows import Chat, TokenRow, request_of
from olpack.data.sources import Source

__all__ = ["Chat", "HubSet", "Renderer", "Source", "TokenRow", "load_chats", "load_split", "render_rows", "request_of", "split"]
