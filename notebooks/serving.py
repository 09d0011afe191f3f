# ---
# jupyter:
#   jupytext:
#     formats: ipynb,py:percent
#     text_representation:
#       extension: .py
#       format_name: percent
#   kernelspec:
#     display_name: Python 3
#     language: python
#     name: python3
# ---

# %% [markdown]
# # Serving
#
# A server with the OpenAI API in front of one model and many adapters: started here as anyone would
# start it, spoken to by the official client, given another adapter while it runs, and watched
# through its metrics. The model is tiny and random, so its text is noise; all else is real.

# %%
import atexit
import os
import queue
import re
import signal
import subprocess
import sys
import tempfile
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
from openai import NotFoundError, OpenAI
from prometheus_client.parser import text_string_to_metric_families

from moelora_jax.cli.demo_files import write_demo

plt.rcParams["figure.dpi"] = 80
folder = tempfile.TemporaryDirectory(prefix="moelora-")  # Goes with the kernel.
demo = Path(folder.name)
write_demo(demo, rows=1, seed=0)

# %% [markdown]
# ## Start
#
# The server has a model, two adapters, and a folder that further ones may be loaded from. Loading
# needs the admin key; without one nobody may. All programs are compiled before the server listens,
# so no request ever waits for a compiler. Port 0 takes a free one.

# %%
command = f"""
moelora serve --model {demo.name}/model --served-model-name tiny
    --adapter attention={demo.name}/adapters/attention-r3
    --adapter experts={demo.name}/adapters/experts-r8
    --adapter-root {demo.name}/adapters --max-adapters 4
    --port 0 --max-length 128 --max-running 8 --max-batch-tokens 64
"""
program = str(Path(sys.executable).parent / "moelora")
server = subprocess.Popen(
    [program, *command.split()[1:]],
    cwd=demo.parent,
    env=os.environ | {"MOELORA_API_KEY": "client-key", "MOELORA_ADMIN_KEY": "admin-key"},
    stderr=subprocess.PIPE,
    text=True,
)
atexit.register(server.terminate)
lines: queue.Queue[str] = queue.Queue()
threading.Thread(target=lambda: [lines.put(line) for line in server.stderr], daemon=True).start()
url = None
while url is None:
    found = re.search(r"Serving tiny on (http://\S+)", lines.get(timeout=240))
    url = found and found[1]

# %% [markdown]
# ## Ask
#
# The field `model` names the base model or an adapter. Everything else is as with OpenAI: chat and
# completions, streams, several choices, log-probabilities.

# %%
client = OpenAI(base_url=f"{url}/v1", api_key="client-key")
for card in client.models.list():
    print(f"{card.id:10} parent: {card.parent}")

# %%
options = {"temperature": 0, "max_tokens": 12, "extra_body": {"ignore_eos": True}}
texts = {}
for model in ("tiny", "attention", "experts"):
    completion = client.completions.create(model=model, prompt="Hello", **options)
    texts[model] = completion.choices[0].text
    print(f"{model:10} {texts[model]!r}")
assert len(set(texts.values())) == 3

messages = [{"role": "user", "content": "Who are you?"}]
stream = client.chat.completions.create(model="experts", messages=messages, stream=True, **options)
pieces = [chunk.choices[0].delta.content or "" for chunk in stream]
print(f"streamed in {len(pieces)} chunks: {''.join(pieces)!r}")

# %% [markdown]
# ## Load an adapter while it runs
#
# The adapter is read and checked beside the running requests, and its pages are written between
# two steps. No program is compiled for it: its rank and what it changes are entries of the page
# tables. The route is that of vLLM, so tools that know it work.

# %%
try:
    client.completions.create(model="both", prompt="Hello", **options)
except NotFoundError as error:
    print("before:", error.body["message"][:48], "...")

admin = OpenAI(base_url=f"{url}/v1", api_key="admin-key")
answer = admin.post(
    "/load_lora_adapter", body={"lora_name": "both", "lora_path": "both-r16"}, cast_to=str
)
print(answer)
completion = client.completions.create(model="both", prompt="Hello", **options)
print("after: ", repr(completion.choices[0].text))
assert completion.choices[0].text not in texts.values()

# %% [markdown]
# ## Watch it under load
#
# 32 clients ask at random for the base model and three adapters. All of these requests share the
# steps of one engine: a batch mixes adapters as they come. As `--max-running` says, 8 run at once
# and others wait. Meanwhile an adapter is reloaded four times, and `/metrics` is read as Prometheus
# would.

# %%
MODELS = ("tiny", "attention", "experts", "both")


def metrics() -> dict[str, float]:
    """All samples, by name and labels."""
    text = admin.get("/../metrics", cast_to=str)
    return {
        sample.name + "".join(f"[{value}]" for value in sample.labels.values()): sample.value
        for family in text_string_to_metric_families(text)
        for sample in family.samples
    }


rng = np.random.default_rng(0)
work = [(str(rng.choice(MODELS)), int(rng.integers(8, 48))) for _ in range(96)]


def ask(request: tuple[str, int]) -> float:
    """Seconds until a completion is there."""
    model, length = request
    began = time.perf_counter()
    limits = options | {"max_tokens": length}
    completion = client.completions.create(model=model, prompt="Once upon a time", **limits)
    assert completion.usage.completion_tokens == length
    return time.perf_counter() - began


before, samples, start = metrics(), [], time.perf_counter()
with ThreadPoolExecutor(32) as clients:
    futures = [clients.submit(ask, request) for request in work]
    while not all(future.done() for future in futures):
        samples.append((time.perf_counter() - start, metrics()))
        if len(samples) <= 4:
            body = {"lora_name": "both", "lora_path": "both-r16", "load_inplace": True}
            admin.post("/load_lora_adapter", body=body, cast_to=str)
        time.sleep(0.05)
    latencies = [future.result() for future in futures]
after = metrics()
samples.append((time.perf_counter() - start, after))

# %%
times = [seconds for seconds, _ in samples]
figure, panels = plt.subplots(1, 3, figsize=(12, 3.2), layout="constrained")
for name in ("running", "waiting"):
    panels[0].plot(times, [s[f"moelora_requests_{name}"] for _, s in samples], label=name)
panels[0].set(xlabel="seconds", ylabel="requests", title="the queue")
panels[0].legend(frameon=False)
tokens_of = {
    model: [
        s.get(f"moelora_adapter_generated_tokens_total[{model}]", 0)
        - before.get(f"moelora_adapter_generated_tokens_total[{model}]", 0)
        for _, s in samples
    ]
    for model in MODELS
}
panels[1].stackplot(times, *tokens_of.values(), labels=MODELS)
panels[1].set(xlabel="seconds", ylabel="tokens generated", title="who got them")
panels[1].legend(frameon=False, loc="upper left")
panels[2].scatter([length for _, length in work], latencies, s=14)
panels[2].set(xlabel="tokens of the completion", ylabel="seconds until it is there")
panels[2].set(title="latency, waiting included", ylim=(0, None))
plt.show()

# %% [markdown]
# The promises of the engine are metrics, too, so that a dashboard can watch them: since the server
# listens nothing was compiled, and no buffer has moved, whatever was loaded meanwhile.

# %%
generated = sum(length for _, length in work)
print(f"{generated} tokens for {len(work)} requests in {times[-1]:.1f} s")
for name in ("compilations", "address_changes", "unplanned_reads", "adapter_loads"):
    print(f"moelora_{name}_total: {after[f'moelora_{name}_total']:.0f}")
for name in ("compilations", "address_changes", "unplanned_reads"):
    assert after[f"moelora_{name}_total"] == before[f"moelora_{name}_total"]
counted = after["moelora_generated_tokens_total"] - before["moelora_generated_tokens_total"]
assert counted == generated
assert after["moelora_adapter_loads_total"] - before["moelora_adapter_loads_total"] >= 1

# %% [markdown]
# ## Stop
#
# SIGTERM, as from a container's orchestrator, lets running requests finish, and refuses new ones.

# %%
server.send_signal(signal.SIGTERM)
print("exit code", server.wait(timeout=60))
assert server.returncode == 0
