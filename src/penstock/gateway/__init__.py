"""The HTTP side: an OpenAI-compatible API in front of one replica. Never imports torch.

app.py          routes and parts, put together by `create_app`
generate.py     request → `Answer`;   answer.py runs it, streamed or whole
switchboard.py  calls ─► desk ─► link, and each step's events back to the calls
inflight.py     a call's choices: events to text
server.py       uvicorn with our limits (`protocol.py`) and a staged drain
"""
