from unsloth import FastLanguageModel
from unsloth.chat_templates import get_chat_template, standardize_sharegpt, train_on_responses_only
from datasets import load_dataset
from trl import SFTConfig, SFTTrainer

lora_rank = 32
model, tokenizer = FastLanguageModel.from_pretrained("unsloth/Qwen3-4B-Instruct-2507", load_in_4bit = False, load_in_8bit = False)
model = FastLanguageModel.get_peft_model(
    model, r = lora_rank, lora_alpha = lora_rank * 2, lora_dropout = 0.05, use_rslora = True,
    target_modules = "all-linear", use_gradient_checkpointing = True, layers_to_transform = [0, 1],
)
tokenizer = get_chat_template(tokenizer, chat_template = "qwen3-instruct")
dataset = load_dataset("mlabonne/FineTome-100k", split = "train[:2000]")
held_out = load_dataset("mlabonne/FineTome-100k", split = "train[2000:2100]")
dataset = standardize_sharegpt(dataset)
settings = dict(seed = 1)
trainer = SFTTrainer(
    model = model, tokenizer = tokenizer, train_dataset = dataset, eval_dataset = held_out,
    args = SFTConfig(
        max_length = 1024, num_train_epochs = 2, warmup_ratio = 0.03, lr_scheduler_type = "cosine", packing = True,
        gradient_accumulation_steps = 4, eval_strategy = "steps", eval_steps = 50, **settings,
    ),
)
trainer = train_on_responses_only(trainer)
trainer.train()
model.push_to_hub_gguf("me/chat", tokenizer, quantization_method = ["q4_k_m", "q8_0", "fast_quantized"], token = "hf_a_token_of_somebody")
