// The service's API. The key stays in this tab's sessionStorage and goes nowhere but to this origin, as a header.

const KEY = "router-ml-key";

export class Problem extends Error {
  constructor(status, detail) {
    super(detail);
    this.status = status;
  }
}

export const useKey = (key) => sessionStorage.setItem(KEY, key);
export const forgetKey = () => sessionStorage.removeItem(KEY);

async function ask(path, options = {}) {
  const headers = { ...options.headers };
  const key = sessionStorage.getItem(KEY);
  if (key) headers["x-api-key"] = key;
  let answer;
  try {
    answer = await fetch(path, { ...options, headers, cache: "no-store", redirect: "error" });
  } catch {
    throw new Problem(0, "the service does not answer");
  }
  const body = await answer.json().catch(() => null);
  if (!answer.ok) throw new Problem(answer.status, body?.detail ?? `the service answered ${answer.status}`);
  return { body, etag: answer.headers.get("etag") };
}

export async function get(path, query = {}) {
  const asked = new URLSearchParams(Object.entries(query).filter(([, value]) => value));
  return (await ask(`${path}${asked.size ? `?${asked}` : ""}`)).body;
}

export async function post(path, body) {
  return (await ask(path, { method: "POST", headers: { "content-type": "application/json" }, body: JSON.stringify(body) })).body;
}

export async function policyInForce() {
  const { body, etag } = await ask("/policy");
  return { ...body, etag };
}

// Raises a Problem of status 412 where another policy than that of `etag` is in force. The answer is what is in force now, with its
// etag: to read it again could reach a process that has not followed yet.
export async function putPolicy(policy, etag, reason) {
  const headers = { "content-type": "application/json", "if-match": etag, "x-change-reason": encodeURIComponent(reason) };
  const put = await ask("/policy", { method: "PUT", headers, body: JSON.stringify(policy) });
  return { ...put.body, etag: put.etag };
}
