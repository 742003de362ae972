//! The local RunPod endpoint and the direct OpenAI server.
