// node node.mjs FOLDER DTYPE ASKED.json COUNT: prints what `answer` returns, as JSON.
import fs from "node:fs";
import * as transformers from "@huggingface/transformers";
import { answer } from "./answer.mjs";

const [folder, dtype, asked, count] = process.argv.slice(2);
transformers.env.localModelPath = "";
const answers = await answer(transformers, folder, dtype, JSON.parse(fs.readFileSync(asked, "utf8")), Number(count));
console.log(JSON.stringify(answers));
