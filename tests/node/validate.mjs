// Reads a JSON list of manifests from standard input and writes what is wrong with each as a JSON list: null where nothing is. The
// validators see types, missing fields and bad values; fields that nobody knows pass.
const validators = {
  "cert-manager.io/v1": "@kubernetes-models/cert-manager/cert-manager.io/v1",
  "keda.sh/v1alpha1": "@kubernetes-models/keda/keda.sh/v1alpha1",
  "monitoring.coreos.com/v1": "@kubernetes-models/prometheus-operator/monitoring.coreos.com/v1",
};

async function problem(manifest) {
  const name = validators[manifest.apiVersion];
  const Model = name && (await import(name))[manifest.kind];
  if (!Model) return `no validator for ${manifest.apiVersion} ${manifest.kind}`;
  try {
    new Model(manifest).validate();
    return null;
  } catch (error) {
    return String(error.message);
  }
}

const chunks = [];
for await (const chunk of process.stdin) chunks.push(chunk);
const problems = await Promise.all(JSON.parse(Buffer.concat(chunks)).map(problem));
process.stdout.write(JSON.stringify(problems));
