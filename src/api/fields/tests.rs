//! Reading and refusing fields.

use super::refuse::refuse_unsupported;
use super::*;
use serde_json::json;

fn message(result: Result<impl std::fmt::Debug, Failure>) -> (String, String) {
    let failure = result.unwrap_err();
    (failure.param.clone().unwrap(), failure.message)
}

#[test]
fn ranges_at_their_ends_and_one_past() {
    for (value, fine) in
        [(json!(0), true), (json!(-0.0), true), (json!(2), true), (json!(2.0001), false), (json!(-0.1), false), (json!(1e300), false)]
    {
        let body = json!({"temperature": value});
        assert_eq!(Fields::new(&body).unwrap().number("temperature").is_ok(), fine, "{body}");
    }
    let body = json!({"temperature": 2.5, "max_tokens": 0});
    let fields = Fields::new(&body).unwrap();
    assert_eq!(message(fields.number("temperature")).1, "2.5 is greater than the maximum of 2 - 'temperature'");
    assert_eq!(message(fields.count("max_tokens")).1, "0 is less than the minimum of 1 - 'max_tokens'");
}

#[test]
fn types_are_not_guessed() {
    let body = json!({"temperature": "0.5", "max_tokens": 1.5, "stream": "yes", "n": true, "stop": 5, "seed": "x"});
    let fields = Fields::new(&body).unwrap();
    assert_eq!(message(fields.number("temperature")).1, "'temperature' must be a number, but it is a string.");
    assert_eq!(message(fields.count("max_tokens")).1, "'max_tokens' must be an integer, but it is the number 1.5.");
    assert!(fields.bool("stream").is_err());
    assert!(fields.count("n").is_err());
    assert!(fields.stop(16).is_err());
    assert!(fields.seed().is_err());
}

#[test]
fn null_is_absent_and_whole_floats_and_huge_numbers_are_integers() {
    let body = json!({"temperature": null, "max_tokens": 16.0, "min_tokens": 1e30});
    let fields = Fields::new(&body).unwrap();
    assert_eq!(fields.number("temperature").unwrap(), None);
    assert_eq!(fields.count("max_tokens").unwrap(), Some(16));
    assert_eq!(fields.count("min_tokens").unwrap(), Some(i64::MAX as usize));
}

#[test]
fn seeds_are_any_64_bit_integer() {
    for (value, seed) in [(json!(0), 0), (json!(-1), u64::MAX), (json!(u64::MAX), u64::MAX), (json!(i64::MIN), 1 << 63), (json!(5.0), 5)] {
        let body = json!({"seed": value});
        assert_eq!(Fields::new(&body).unwrap().seed().unwrap(), Some(seed));
    }
    for value in [json!(1.5), json!(1e30), json!("1")] {
        let body = json!({"seed": value});
        assert!(Fields::new(&body).unwrap().seed().is_err());
    }
}

#[test]
fn layers_top_level_then_sampling_params_then_metadata() {
    let body = json!({
        "temperature": 1, "top_p": null,
        "sampling_params": {"temperature": 2, "top_p": 0.5, "top_k": -7},
        "metadata": {"top_p": 0.1, "min_tokens": 3, "seed": "a label"},
    });
    let fields = Fields::new(&body).unwrap();
    assert_eq!(fields.number("temperature").unwrap(), Some(1.0));
    assert_eq!(fields.number("top_p").unwrap(), Some(0.5));
    assert_eq!(fields.count("min_tokens").unwrap(), Some(3));
    assert_eq!(fields.seed().unwrap(), None, "strings in metadata are the user's own labels");
    assert_eq!(message(fields.integer("top_k")).0, "sampling_params.top_k");
}

#[test]
fn other_names_of_a_field_work_in_every_layer() {
    let body = json!({"repeat_penalty": 1.2, "sampling_params": {"min_new_tokens": 3, "repetition_penalty": 1.5}});
    let fields = Fields::new(&body).unwrap();
    assert_eq!(fields.number("repetition_penalty").unwrap(), Some(1.2), "the layer counts before the spelling");
    assert_eq!(fields.count("min_tokens").unwrap(), Some(3));
    let large = json!({"repeat_penalty": 1e4});
    assert_eq!(message(Fields::new(&large).unwrap().number("repetition_penalty")).0, "repeat_penalty", "as the caller wrote it");
    let body = json!({"min_tokens": null, "min_new_tokens": 3});
    assert_eq!(Fields::new(&body).unwrap().count("min_tokens").unwrap(), Some(3));
    let body = json!({"stop": [], "stop_sequences": ["a", "b"], "stop_strings": "c"});
    assert_eq!(Fields::new(&body).unwrap().stop(16).unwrap(), ["a", "b", "c"]);
    let body = json!({"stop": vec!["x"; 16], "stop_sequences": ["a"]});
    assert_eq!(message(Fields::new(&body).unwrap().stop(16)).0, "stop_sequences");
    let body = json!({"suppress_tokens": [4], "bad_words_token_ids": [3]});
    assert_eq!(Fields::new(&body).unwrap().bad_words(5, |_| Ok(Vec::new())).unwrap(), [[3], [4]]);
    let body = json!({"suppress_tokens": [5]});
    assert_eq!(message(Fields::new(&body).unwrap().bad_words(5, |_| Ok(Vec::new()))).0, "suppress_tokens[0]");
}

#[test]
fn stops_and_biases() {
    let body = json!({"stop": ["a", ""], "logit_bias": {"5": 100, "9": -101}});
    let fields = Fields::new(&body).unwrap();
    assert!(message(fields.stop(16)).1.contains("empty string"));
    assert_eq!(message(fields.logit_bias(10)).0, "logit_bias.9");
    assert_eq!(message(fields.logit_bias(5)).0, "logit_bias.5", "unknown id");
    let body = json!({"stop": vec!["x"; 17]});
    assert!(Fields::new(&body).unwrap().stop(16).is_err());
    let body = json!({"stop": "x", "logit_bias": {"5": -100}});
    let fields = Fields::new(&body).unwrap();
    assert_eq!(fields.stop(16).unwrap(), ["x"]);
    assert_eq!(fields.logit_bias(6).unwrap(), [(5, -100.0)]);
    let body = json!({"stop": ["x".repeat(16 * 1024 + 1)], "bad_words": ["x".repeat(1025)]});
    let fields = Fields::new(&body).unwrap();
    assert!(message(fields.stop(16)).1.contains("a string of 16385 bytes"));
    assert_eq!(message(fields.bad_words(5, |_| Ok(vec![1]))).0, "bad_words[0]");
}

#[test]
fn unsupported_fields_are_refused_by_name_and_neutral_values_pass() {
    let refused = [
        json!({"tools": [{"type": "function"}]}),
        json!({"tool_choice": "required"}),
        json!({"logprob_token_ids": [3]}),
        json!({"temp_scaled_logprobs": true}),
        json!({"include_logprobs_decode_token": false}),
        json!({"suffix": "x"}),
        json!({"use_beam_search": true}),
        json!({"priority": 1}),
        json!({"priority": -5}),
        json!({"priority": "high"}),
        json!({"modalities": ["text", "audio"]}),
        json!({"sampling_params": {"allowed_token_ids": [1]}}),
        json!({"metadata": {"reasoning_max_tokens": 5}}),
        json!({"num_beams": 4}),
        json!({"repetition_detection": {"max_pattern_size": 4}}),
        json!({"thinking_budget": 100}),
        json!({"include_reasoning": false}),
        json!({"separate_reasoning": true}),
        json!({"thinking": {"type": "enabled", "budget_tokens": 1024}}),
        json!({"thinking": {"type": "disabled", "display": "omitted"}}),
        json!({"reasoning": {"effort": "high"}}),
        json!({"reasoning": true}),
        json!({"tools": [{"type": "function"}], "tool_choice": "auto"}),
    ];
    for body in refused {
        let fields = Fields::new(&body).unwrap();
        let failure = refuse_unsupported(&fields, false, false).unwrap_err();
        assert_eq!(failure.code, Some("unsupported_parameter"), "{body}");
        assert!(body.to_string().contains(failure.param.unwrap().rsplit('.').next().unwrap()));
    }
    let neutral = json!({
        "tools": [], "tool_choice": "auto", "response_format": {"type": "text"}, "include_logprobs_decode_token": true, "suffix": null, "use_beam_search": false, "modalities": ["text"], "guided_json": null, "length_penalty": 1.0, "priority": 0,
        "parallel_tool_calls": true, "user": "me", "something_new": {"a": 1}, "store": true, "verbosity": "low",
        "num_beams": 1, "repetition_detection": {}, "thinking_budget": -1, "include_reasoning": true, "separate_reasoning": false,
        "thinking": {"type": "disabled"}, "reasoning": {"effort": "none", "summary": null},
    });
    assert!(refuse_unsupported(&Fields::new(&neutral).unwrap(), false, false).is_ok());
}

#[test]
fn a_suffix_passes_where_the_model_can_lead_to_one() {
    for (suffix, infills, passes) in
        [(json!("x"), true, true), (json!("x"), false, false), (json!(["x"]), true, false), (json!({"top_k": 1}), false, true)]
    {
        let body = json!({ "suffix": suffix });
        assert_eq!(refuse_unsupported(&Fields::new(&body).unwrap(), false, infills).is_ok(), passes, "{body}");
    }
}

/// Fields of chats have readers of their own there.
#[test]
fn in_chats_tools_and_thoughts_pass() {
    let body = json!({
        "tools": [{"type": "function", "function": {"name": "f"}}], "tool_choice": "required", "include_reasoning": false,
        "separate_reasoning": true, "thinking": {"type": "enabled"}, "reasoning": {"effort": "high"},
    });
    let fields = Fields::new(&body).unwrap();
    assert!(refuse_unsupported(&fields, true, false).is_ok());
    assert_eq!(refuse_unsupported(&fields, false, false).unwrap_err().code, Some("unsupported_parameter"));
    for body in [json!({"thinking_budget": 5}), json!({"reasoning_max_tokens": 5})] {
        let fields = Fields::new(&body).unwrap();
        assert!(refuse_unsupported(&fields, true, false).is_ok(), "{body}");
        assert!(refuse_unsupported(&fields, false, false).is_err(), "{body}");
    }
}

#[test]
fn tools_pass_when_they_are_only_text_for_the_template() {
    let tools = json!([{"type": "function", "function": {"name": "f"}}]);
    for (body, param) in [
        (json!({"tools": tools, "tool_choice": "none"}), None),
        (json!({"tools": tools, "tool_choice": null}), Some("tools")),
        (json!({"chat_template_kwargs": {"tools": tools}, "tool_choice": "none"}), None),
        (json!({"chat_template_kwargs": {"tools": []}}), None),
        (json!({"chat_template_kwargs": {"tools": tools}}), Some("chat_template_kwargs.tools")),
    ] {
        let refused = refuse_unsupported(&Fields::new(&body).unwrap(), false, false).err();
        assert_eq!(refused.and_then(|failure| failure.param).as_deref(), param, "{body}");
    }
}
