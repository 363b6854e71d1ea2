"""Whole requests as clients send them, written by hand from their documentation and sources.

The last message of each asks for "so?", which the fake engine sends back.
"""

from __future__ import annotations

from typing import Any

_SCHEMA: dict[str, Any] = {
    "$schema": "http://json-schema.org/draft-07/schema#",
    "type": "object",
    "properties": {"path": {"type": "string"}},
    "required": ["path"],
    "additionalProperties": False,
}
_READ: dict[str, Any] = {"name": "read", "description": "Read a file.", "parameters": _SCHEMA}
_CALL: dict[str, Any] = {
    "id": "call_1",
    "type": "function",
    "function": {"name": "read", "arguments": '{"path": "a"}'},
}
_USER: dict[str, Any] = {"role": "user", "content": "so?"}
_EPHEMERAL: dict[str, Any] = {"cache_control": {"type": "ephemeral"}}
CHAT, TEXT, RESPONSES, MESSAGES = (
    f"/v1/{path}" for path in ("chat/completions", "completions", "responses", "messages")
)

FORMS: dict[str, tuple[str, dict[str, Any]]] = {
    "Codex": (RESPONSES, {
        "model": "gpt-5.2-codex", "instructions": "You are Codex.", "store": False,
        "tools": [
            {"type": "function", "strict": False, **_READ},
            {"type": "namespace", "name": "mcp__files", "description": "", "tools": [
                {"type": "function", "strict": False, "defer_loading": True, **_READ}]},
            {"type": "custom", "name": "apply_patch", "description": "", "format": {
                "type": "grammar", "syntax": "lark", "definition": "start: /.*/"}},
            {"type": "web_search", "external_web_access": False},
            {"type": "tool_search", "execution": "client", "parameters": {}},
        ],
        "tool_choice": "auto", "parallel_tool_calls": True, "stream": True,
        "reasoning": {"effort": "medium", "summary": "auto"}, "text": {"verbosity": "low"},
        "include": ["reasoning.encrypted_content"], "service_tier": "priority",
        "prompt_cache_key": "019a", "client_metadata": {"x-codex-installation-id": "1"},
        "input": [
            {"type": "message", "role": "developer", "content": [
                {"type": "input_text", "text": "<permissions>"}]},
            {"type": "message", "role": "user", "content": [
                {"type": "input_text", "text": "<environment_context>"}]},
            {"type": "reasoning", "summary": [], "content": None, "encrypted_content": None},
            {"type": "function_call", "name": "read", "namespace": "mcp__files",
             "arguments": "", "call_id": "call_1"},
            {"type": "function_call_output", "call_id": "call_1", "output": "text"},
            {"type": "custom_tool_call", "status": "completed", "call_id": "call_2",
             "name": "apply_patch", "input": "*** Begin Patch"},
            {"type": "custom_tool_call_output", "call_id": "call_2", "output": "done"},
            {"type": "message", "role": "assistant", "phase": "commentary", "content": [
                {"type": "output_text", "text": "Done."}]},
            {"type": "message", **_USER}]}),
    "Claude Code": (MESSAGES, {
        "model": "claude-opus-4-7", "max_tokens": 64000, "stream": True,
        "system": [
            {"type": "text", "text": "x-anthropic-billing-header: cc_version=2.1; cch=0;"},
            {"type": "text", "text": "You are Claude Code.",
             "cache_control": {"type": "ephemeral", "ttl": "1h", "scope": "global"}}],
        "tools": [
            {"name": "Read", "description": "Read.", "input_schema": _SCHEMA,
             "eager_input_streaming": True, "defer_loading": True, "strict": True, **_EPHEMERAL},
            {"type": "web_search_20250305", "name": "web_search", "max_uses": 8},
            {"type": "tool_search_tool_regex_20251119", "name": "tool_search_tool_regex"}],
        "tool_choice": {"type": "auto"}, "metadata": {"user_id": "{}"},
        "thinking": {"type": "adaptive", "display": "summarized"}, "speed": "fast",
        "context_management": {"edits": [{"type": "clear_thinking_20251015", "keep": "all"}]},
        "output_config": {"effort": "high"}, "diagnostics": {"previous_message_id": None},
        "messages": [
            {"role": "user", "content": [
                {"type": "text", "text": "<system-reminder>"}, {"type": "text", "text": "Go."}]},
            {"role": "assistant", "content": [
                {"type": "thinking", "thinking": "", "signature": "EqQB"},
                {"type": "redacted_thinking", "data": "x"},
                {"type": "tool_use", "id": "toolu_1", "name": "Read", "input": {"path": "a"},
                 "caller": {"type": "direct"}},
                {"type": "tool_use", "id": "toolu_2", "name": "Read", "input": {}}]},
            {"role": "user", "content": [
                {"type": "tool_result", "tool_use_id": "toolu_1", "content": "text"},
                {"type": "tool_result", "tool_use_id": "toolu_2", "is_error": True,
                 "content": [{"type": "text", "text": "No."}], **_EPHEMERAL}]},
            {"role": "system", "content": "The date has changed."},
            {"role": "user", "content": [{"type": "text", "text": "so?", **_EPHEMERAL}]}]}),
    "Claude Code, title of a session": (MESSAGES, {
        "model": "claude-haiku-4-5", "max_tokens": 32000, "temperature": 1, "tools": [],
        "thinking": {"type": "disabled"}, "messages": [_USER], "stream": True,
        "output_config": {"format": {"type": "json_schema", "schema": _SCHEMA}}}),
    "OpenAI Agents SDK": (RESPONSES, {
        "model": "gpt-9", "instructions": "Help.", "include": [], "tool_choice": "auto",
        "tools": [{"type": "function", "strict": True, **_READ}], "store": None, "prompt": None,
        "previous_response_id": None, "conversation": None, "truncation": None,
        "input": [
            {"role": "user", "content": "Go."},
            {"id": "rs_1", "type": "reasoning", "summary": [], "status": None},
            {"id": "fc_1", "type": "function_call", "status": "completed", "call_id": "call_1",
             "name": "read", "arguments": "{}"},
            {"type": "function_call_output", "call_id": "call_1", "output": "text"}, _USER]}),
    "OpenAI Agents SDK, chat": (CHAT, {
        "model": "gpt-9", "tools": [{"type": "function", "function": _READ | {"strict": True}}],
        "store": True, "stream_options": {"include_usage": True}, "reasoning_effort": None,
        "parallel_tool_calls": False, "messages": [
            {"role": "assistant", "content": None, "refusal": None, "tool_calls": [_CALL]},
            {"role": "tool", "tool_call_id": "call_1", "content": "text"}, _USER]}),
    "LangChain": (CHAT, {
        "model": "gpt-9", "n": 1, "stop": None, "max_completion_tokens": 20,
        "parallel_tool_calls": False,
        "tools": [{"type": "function", "function": _READ | {"strict": True}}],
        "messages": [
            {"role": "assistant", "content": None, "tool_calls": [_CALL]},
            {"role": "tool", "tool_call_id": "call_1", "content": "text", "name": "read"}, _USER]}),
    "LiteLLM": (CHAT, {
        "model": "gpt-9", "max_tokens": 20, "reasoning_effort": "low", "metadata": {"a": "b"},
        "extra_body": {}, "drop_params": True, "messages": [
            {"role": "assistant", "content": None, "function_call": None, "tool_calls": [
                _CALL | {"index": 0}], "provider_specific_fields": {"refusal": None},
             "thinking_blocks": [{"type": "thinking", "thinking": "m", "signature": "s"}],
             "reasoning_content": "m", "images": []},
            {"role": "tool", "tool_call_id": "call_1", "name": "read", "content": "text"}, _USER]}),
    "Open WebUI": (CHAT, {
        "model": "fake/model", "stream": True, "stream_options": {"include_usage": True},
        "user": {"name": "A", "id": "1", "email": "a@b", "role": "admin"}, "chat_id": "c",
        "session_id": "s", "id": "m", "background_tasks": {"title_generation": True},
        "features": {"web_search": False}, "variables": {"{{USER_NAME}}": "A"}, "params": {},
        "tool_ids": [], "tool_servers": [], "files": [], "max_tokens": 128, "num_ctx": 4096,
        "frequency_penalty": 0, "custom_param": "x", "logit_bias": {}, "messages": [
            {"role": "system", "content": "Help."},
            {"role": "user", "content": [{"type": "text", "text": "Go."}]},
            {"role": "assistant", "content": "Done.", "output": [], "usage": {}}, _USER]}),
    "Open WebUI, title": (CHAT, {
        "model": "fake/model", "stream": False, "max_completion_tokens": 1000,
        "metadata": {"task": "title_generation", "task_body": {}}, "messages": [_USER]}),
    "Continue": (CHAT, {
        "model": "m", "max_tokens": 4096, "temperature": None, "top_p": None, "stop": [],
        "frequency_penalty": None, "presence_penalty": None, "stream": True,
        "parallel_tool_calls": False, "tool_choice": None,
        "tools": [{"type": "function", "function": _READ}],
        "prediction": {"type": "content", "content": "old"}, "messages": [
            {"role": "system", "content": [{"type": "text", "text": "Help.", **_EPHEMERAL}]},
            {"role": "assistant", "content": " ", "tool_calls": [_CALL]},
            {"role": "tool", "tool_call_id": "call_1", "content": "text"}, _USER]}),
    "Continue, completion": (TEXT, {
        "model": "m", "prompt": "so?", "max_tokens": 4096, "temperature": 0.01, "stream": True,
        "stop": ["<fim_prefix>", "<|endoftext|>", "\n\n"], "presence_penalty": 0, "suffix": ""}),
    "Cline": (CHAT, {
        "model": "m", "temperature": 0, "stream": True, "stream_options": {"include_usage": True},
        "max_tokens": -1, "messages": [
            {"role": "system", "content": "Help."},
            {"role": "user", "content": [{"type": "text", "text": "so?", **_EPHEMERAL}]}]}),
    "Zed": (CHAT, {
        "model": "m", "stream": True, "max_completion_tokens": 20, "stop": [], "temperature": 1,
        "tool_choice": "auto", "parallel_tool_calls": False, "prompt_cache_key": "k",
        "tools": [{"type": "function", "function": _READ}], "messages": [
            {"role": "assistant", "content": None, "tool_calls": [_CALL]},
            {"role": "tool", "content": "text", "tool_call_id": "call_1"},
            {"role": "user", "content": [{"type": "text", "text": "so?"}]}]}),
    "mlx-lm": (CHAT, {
        "model": "default_model", "messages": [_USER], "max_tokens": 20, "repetition_penalty": 0.0,
        "repetition_context_size": 20, "presence_penalty": 0.0, "presence_context_size": 20,
        "frequency_penalty": 0.0, "frequency_context_size": 20, "xtc_probability": 0.0,
        "xtc_threshold": 0.1, "top_logprobs": -1, "logprobs": False, "adapters": None,
        "draft_model": "default_model", "num_draft_tokens": 3, "role_mapping": None,
        "chat_template_kwargs": {"enable_thinking": False}}),
    "llama.cpp's page": (CHAT, {
        "messages": [_USER], "stream": True, "cache_prompt": True, "samplers": "edkypmxt",
        "temperature": 0.8, "dynatemp_range": 0, "dynatemp_exponent": 1, "top_k": 40,
        "top_p": 0.95, "min_p": 0.05, "typical_p": 1, "xtc_probability": 0, "xtc_threshold": 0.1,
        "repeat_last_n": 64, "repeat_penalty": 1, "presence_penalty": 0, "frequency_penalty": 0,
        "dry_multiplier": 0, "dry_base": 1.75, "max_tokens": -1, "timings_per_token": True,
        "reasoning_format": "auto", "return_progress": True, "backend_sampling": False}),
}  # fmt: skip
