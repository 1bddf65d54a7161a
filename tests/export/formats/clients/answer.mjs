// What a user of transformers.js writes: a folder, prompts with pictures, and the most likely tokens after them.
export async function answer(transformers, folder, dtype, asked, count) {
  const { AutoModelForImageTextToText, AutoProcessor, env, load_image } = transformers;
  env.allowRemoteModels = false;
  env.allowLocalModels = true;
  const processor = await AutoProcessor.from_pretrained(folder);
  const model = await AutoModelForImageTextToText.from_pretrained(folder, dtype ? { dtype } : {});
  const answers = [];
  for (const [text, picture] of asked) {
    const content = [{ type: "image" }, { type: "text", text }];
    const prompt = processor.apply_chat_template([{ role: "user", content }], { add_generation_prompt: true });
    const inputs = await processor(await load_image(picture), prompt);
    const made = await model.generate({ ...inputs, do_sample: false, min_new_tokens: count, max_new_tokens: count });
    answers.push(made.tolist()[0].map(Number));
  }
  return answers;
}
