# A server with a bounded cache: docker run --gpus all --env VLLM_API_KEY=KEY reasonkv MODEL --method NAME --budget TOKENS --host 0.0.0.0
FROM vllm/vllm-openai:v0.32.0
COPY . /opt/reasonkv
# vLLM and torch are the image's own
RUN pip install --no-cache-dir /opt/reasonkv && mkdir /metrics
# with a folder of its own the server is the container's first process, and gets its signals
ENV PROMETHEUS_MULTIPROC_DIR=/metrics
EXPOSE 8000
ENTRYPOINT ["reasonkv", "serve"]
