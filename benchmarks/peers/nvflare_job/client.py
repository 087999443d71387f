"""A site: adds its number to every value and sends the full model back."""

import nvflare.client as flare

flare.init()
constant = int(flare.get_site_name().rpartition("-")[2])
while flare.is_running():
    received = flare.receive()
    if received is None:
        break
    for value in received.params.values():
        value.add_(constant)
    flare.send(flare.FLModel(params=received.params, meta={"NUM_STEPS_CURRENT_ROUND": 1}))
