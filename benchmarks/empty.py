"""A handler that reads a callback's JSON and says yes: what FastAPI itself costs."""

from fastapi import FastAPI, Request

app = FastAPI(openapi_url=None)


@app.post("/api/webhooks/happyrobot")
async def receive(request: Request) -> dict[str, bool]:
    await request.json()
    return {"success": True}
