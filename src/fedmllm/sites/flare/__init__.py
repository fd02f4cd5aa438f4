"""NVFlare carries the messages (`fedmllm[nvflare]`, 2.9). Nothing else here imports it."""
